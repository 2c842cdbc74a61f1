"""Makes fusekit's merge methods known to mergekit when, and only when, mergekit loads its own.

Run at interpreter start by fusekit.pth (fusekit.start from Python 3.15 on). It puts one finder on sys.meta_path that
waits for `mergekit.merge_methods.registry`, lets that import finish, registers fusekit's methods and is gone. Nothing
else is imported before then. FUSEKIT_AUTOLOAD=0 turns it off. It never raises.
"""

import sys

TYPE_CHECKING = False  # not imported from typing: this runs at every interpreter start
if TYPE_CHECKING:
    from typing import Any

TARGET = "mergekit.merge_methods.registry"


class _Finder:
    """Waits for one module."""

    @classmethod
    def find_spec(cls, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name != TARGET:
            return None
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                _register_after(spec.loader)
                return spec
        return None


def _register_after(loader: "Any") -> None:
    execute = loader.exec_module

    def exec_module(module: "Any") -> None:
        del loader.exec_module  # the class's own again
        execute(module)
        try:
            from fusekit.mergekit_plugin import register

            register()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"fusekit: its merge methods are not available ({reason}). `fusekit doctor` says more; "
                "FUSEKIT_AUTOLOAD=0 silences this.",
                file=sys.stderr,
            )

    loader.exec_module = exec_module


def install() -> None:
    """Put the finder in place, unless FUSEKIT_AUTOLOAD is 0 or mergekit's registry is loaded already."""
    import os  # loaded before any .pth file is read

    if os.environ.get("FUSEKIT_AUTOLOAD") != "0" and TARGET not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
