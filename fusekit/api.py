"""What a script does in one call: find the model, read the examples, capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fusekit.capturing.capture import Capture
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.capturing.settings import CaptureSettings, EngineSettings
from fusekit.capturing.store import Store, date_of
from fusekit.data.prepare import pack_text, prepare
from fusekit.data.reading import DataCounts, rows_of
from fusekit.data.settings import DataSettings
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, ModelError
from fusekit.yaml import nearest

CUTS = ("max_length", "overlong", "train_on", "on_bad_row", "pack")
"""Fields of DataSettings that say what becomes of examples, wherever they are from."""


def capture_job(
    model: str | Path | ModelChoice,
    dataset: Any,
    out: str | Path,
    *,
    engine: str | Sequence[str] = "transformers",
    chat_template: str = "own",
    others: Sequence[str] = (),
    counts: DataCounts | None = None,
    say: Callable[[str], None] = lambda _line: None,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Capture:
    """What :func:`capture` does, before it is done. counts: what the reader of ``dataset`` counts."""
    if not isinstance(model, (str, PathLike, ModelChoice)):
        raise ModelError(f"model is {type(model).__name__}: give its name on the hub, its folder or a ModelChoice")
    known = (*CUTS, *CaptureSettings.model_fields)
    if unknown := [name for name in settings if name not in known]:
        raise DataError(f"capture has no setting {unknown[0]!r}{nearest(unknown[0], known)}")
    try:
        data = DataSettings(path=".", **{name: settings.pop(name) for name in CUTS if name in settings})
        how = CaptureSettings(**settings)
        urls = [engine] if isinstance(engine, str) else list(engine)
        where = EngineSettings(**({"url": urls} if "://" in urls[0] else {"name": urls[0]}))
    except ValidationError as error:
        wrong = [f"{found['loc'][0]} is {found['input']!r}: {found['msg']}" for found in error.errors()]
        raise DataError("; ".join(wrong)) from error
    choice = model if isinstance(model, ModelChoice) else ModelChoice(str(model), engine=where)
    checkpoint = find_checkpoint(choice)
    beside = [find_checkpoint(ModelChoice(name), weights=False) for name in others]
    for line in [line for found in (checkpoint, *beside) for line in found.notices]:
        say(line)
    date = None if overwrite else date_of(Path(out))
    own = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(chat_template), data.train_on, date=date)
    readers = [own, *(RowTokenizer(load_tokenizer(one), None, data.train_on, date=own.date) for one in beside)]
    counts = DataCounts(data.on_bad_row) if counts is None else counts
    rows = rows_of(dataset, counts)
    if data.pack:
        rows = pack_text(rows, readers, data.max_length)
    prepared = prepare(rows, readers, data.max_length, data.overlong, counts)
    if not prepared.rows:
        raise DataError(f"no example is left: {prepared.counts}")
    for line in counts.lines:
        say(line)
    # The rows' cuts are compared when the capture is resumed; these say why they differ.
    details = {"max_length": data.max_length, "overlong": data.overlong}
    return Capture(
        checkpoint,
        own,
        prepared.rows,
        out,
        how,
        details=details,
        overwrite=overwrite,
        ignore_estimates=ignore_estimates,
        quiet=quiet,
        notify=say,
    )


def capture(model: str | Path | ModelChoice, dataset: Any, out: str | Path, **options: Any) -> Store:
    """Capture what a model says about examples: its top-k rows at every label. A store that is begun is resumed.

    >>> from fusekit import capture
    >>> messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    >>> store = capture("demo/models/numbers", [{"messages": messages}], folder, quiet=True)
    >>> len(store), store.spec.top_k
    (1, 10)

    Args:
        model: a folder, a name on the Hugging Face hub, the path of a GGUF file, or a ModelChoice that says how it is
            loaded (dtype, device_map, quantization, revision).
        dataset: a ``datasets.Dataset``, a list of records, or paths of files: messages, ShareGPT's conversations,
            instruction triples or text.
        out: folder of the store.
        engine: what runs a model that is given by name: ``transformers``, ``vllm``, or the URLs of servers of it.
        chat_template: ``own``, the name of a shipped template, or a jinja file.
        others: other models of the run: examples are cut where all of them read the same bytes.
        say: called with lines for the user.
        overwrite: start over where there is a store.
        ignore_estimates: start although disk or memory do not seem to suffice.
        quiet: show no progress.
        settings: fields of :class:`~fusekit.capturing.settings.CaptureSettings` (top_k, temperature, ...), and
            ``max_length``, ``overlong``, ``train_on``, ``on_bad_row`` and ``pack`` of
            :class:`~fusekit.data.settings.DataSettings`.

    Returns:
        The store, which :class:`~fusekit.FusionTrainer` takes as a teacher.

    Raises:
        CaptureError: the model cannot be found or loaded, or does not fit.
        DataError: there is no example that can be read; an unknown setting, with the nearest name.
        StorageError: the store was made from other inputs (says which), or the disk fails.
    """
    return capture_job(model, dataset, out, **options).run()
