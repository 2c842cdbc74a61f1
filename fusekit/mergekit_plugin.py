"""Registers fusekit's merge methods with mergekit, and does nothing else."""

from __future__ import annotations

import sys

from fusekit.errors import MergeError


def register() -> None:
    """Make fusekit's merge methods known to mergekit. Calling it again is harmless.

    While `fusekit.merge_methods` is being imported (its own imports load mergekit, whose registry calls this), nothing
    happens yet: that package calls again when it is complete. Raises MergeError if another package has taken a name.
    """
    package = sys.modules.get("fusekit.merge_methods")
    if package is not None and getattr(package.__spec__, "_initializing", False) and not hasattr(package, "__all__"):
        return
    from mergekit.merge_methods import registry

    from fusekit.merge_methods.mergekit_methods import METHODS
    from fusekit.merge_methods.provenance import record_to_environment_path

    known = {method.spec.name: method for method in registry.registered_methods()}
    for method in METHODS:
        if method.spec.name not in known:
            registry.register(method)
        elif known[method.spec.name] is not method:
            raise MergeError(
                f"mergekit already has a merge method {method.spec.name!r}, from {type(known[method.spec.name])}; "
                "uninstall one of the two packages"
            )
    if not any(method.spec.name in known for method in METHODS):
        record_to_environment_path()
