"""The parts of a run from Python: rows to stores to a target, each model by itself.

    python docs/examples/pieces.py OUT

The capture of a source needs that model and the pivot's tokenizer, nothing else of the pivot; the distillation needs
the stores and the sources' tokenizers. So each part can run where there is room for it: a store is a folder to copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fusekit.capturing.capture import Capture
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.capturing.store import Store
from fusekit.data.prepare import prepare
from fusekit.data.reading import read_rows
from fusekit.data.tokenize import RowTokenizer
from fusekit.distillation.inputs import Inputs, Source
from fusekit.distillation.run import distill
from fusekit.distillation.settings import DistillSettings
from fusekit.types import Row

DEMO = Path(__file__).parents[2] / "demo"
MODELS = {"pivot": DEMO / "models" / "pivot", "neox": DEMO / "sources" / "neox"}


def reader(name: str) -> RowTokenizer:
    """How a model reads rows; only its tokenizer is needed."""
    return RowTokenizer(load_tokenizer(find_checkpoint(ModelChoice(str(MODELS[name])), weights=False)))


def shared_rows(limit: int | None = None) -> list[Row]:
    """The rows, cut at the same bytes for every model. Every machine makes the same ones of the same file."""
    rows = read_rows(str(DEMO / "rows" / "train.jsonl"), limit=limit)
    return prepare(rows, [reader(name) for name in MODELS], max_length=128).rows


def captured(name: str, rows: list[Row], out: Path) -> Store:
    """What one model says about the rows; run it where that model fits."""
    checkpoint = find_checkpoint(ModelChoice(str(MODELS[name]), dtype="float32"))
    return Capture(checkpoint, reader(name), rows, out).run()


def train(rows: list[Row], stores: dict[str, Path], out: Path) -> list[Path]:
    """A target per source, from the stores alone; `changes` are the fields of the settings' sections."""
    source = Source(stores["neox"], tokenizer=str(MODELS["neox"]))
    inputs = Inputs(ModelChoice(str(MODELS["pivot"])), rows, stores["pivot"], {"neox": source})
    changes = {
        "training": {"num_train_epochs": 1, "learning_rate": 1e-3, "batch_size": 8, "per_device_train_batch_size": 8}
    }
    return distill(inputs, DistillSettings.of("fusekit", changes), out, say=print)


def main(out: Path, limit: int | None = None) -> list[Path]:
    """All of it, one after the other. limit: most rows to read."""
    rows = shared_rows(limit)
    stores = {name: out / "stores" / name for name in MODELS}
    for name, place in stores.items():
        print(name, captured(name, rows, place).summary.labels.sum(), "labels")
    return train(rows, stores, out / "targets")


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
