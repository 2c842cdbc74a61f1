"""`fusekit doctor`: what is installed, what the devices are, and whether mergekit sees fusekit and if not why."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from fusekit import __version__
from fusekit.artifacts import installed
from fusekit.cli.common import print_json
from fusekit.disk import human

PACKAGES = ("mergekit", "transformers", "torch", "safetensors", "tokenizers", "numpy", "huggingface_hub")
METHODS = ("fusechat_sce", "varm", "widen")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: versions, devices, sees_fusekit, other_fusekit.")
def doctor(as_json: bool) -> None:
    """Explain this installation in plain words.

    Exit status 1 if stock mergekit does not see fusekit's methods, or if another project called fusekit is installed.
    """
    works, explanation = _autoload()
    clash = _other_fusekit()
    if as_json:
        found = {"versions": _versions(), "devices": _devices(), "sees_fusekit": works, "other_fusekit": clash}
        print_json(found)
    else:
        for title, lines in (
            ("Versions", [f"{name:<16} {version}" for name, version in _versions().items()]),
            ("Devices", _devices()),
            ("Stock mergekit (mergekit-yaml, mergekit-multi, mergekit-pytorch)", explanation),
            ("Another fusekit", clash),
        ):
            if lines:
                click.echo("\n".join([title, *(f"  {line}" for line in lines), ""]))
    if clash or not works:
        click.get_current_context().exit(1)


def _versions() -> dict[str, str]:
    there = {name: installed(name) or "not installed" for name in PACKAGES}
    return {"python": f"{platform.python_version()} ({sys.executable})", "fusekit": __version__, **there}


def _devices() -> list[str]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; "
        f"memory: {human(memory.total)}, {human(memory.available)} available",
        *(f"CUDA {index}: {found.name}, {human(found.total_memory)}" for index, found in enumerate(cuda)),
    ]


def _other_fusekit() -> list[str]:
    """Lines about another project's distribution called `fusekit` that is installed here; empty if there is none."""
    if (found := installed("fusekit")) is None:
        return []
    return [
        f"The distribution fusekit {found} is installed. It is another project, whose files and this one's",
        "(mergekit-fusekit) overwrite each other. To mend it:",
        "pip uninstall fusekit mergekit-fusekit && pip install mergekit-fusekit",
    ]


def _autoload() -> tuple[bool, list[str]]:
    """Whether a stock mergekit command started now would know fusekit's methods, and the explanation, for people."""
    folders = (Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages"))
    hook = next((folder / "fusekit.pth" for folder in folders if (folder / "fusekit.pth").is_file()), None)
    seen, complaint = _ask()
    if seen == set(METHODS):
        return True, [f"sees fusekit through {hook or 'another import'}: merge_method {', '.join(METHODS)} are known."]
    if "No module named 'mergekit'" in complaint:
        reason = "mergekit is not installed for this Python: pip install 'mergekit>=0.1.5,<0.2'"
    elif os.environ.get("FUSEKIT_AUTOLOAD") == "0":
        reason = "the environment variable FUSEKIT_AUTOLOAD=0 turns it off: unset it"
    elif hook is None:
        reason = "fusekit.pth is in no site-packages folder of this Python: install fusekit into mergekit's environment"
    else:
        reason = f"{hook} is in place, but mergekit did not get the methods: {complaint or 'no message was printed'}"
    return False, [
        f"does not see fusekit's merge methods, because {reason}",
        "Ways without it: `fusekit merge RECIPE OUT`, `python -m fusekit.mergekit_yaml RECIPE OUT`,",
        "or `import fusekit.merge_methods` in your own Python code.",
    ]


def _ask() -> tuple[set[str], str]:
    """The methods that a fresh interpreter's mergekit knows, and the line it printed if something was wrong."""
    program = (
        "import mergekit.merge_methods as m; names = {x.spec.name for x in m.registered_methods()}; "
        f"print(*sorted(names & {set(METHODS)!r}))"
    )
    # Neither PYTHONPATH nor the current folder may show it a fusekit that mergekit-yaml would not see.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, cwd=empty
        )
    complaints = [line for line in done.stderr.splitlines() if "fusekit" in line or "Error" in line]
    return set(done.stdout.split()), complaints[-1] if complaints else ""
