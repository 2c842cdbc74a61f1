"""What a script does in one call: find the model, read the examples, capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fusekit.capturing.capture import Capture
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.manifest import date_of
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.settings import CaptureSettings, EngineSettings
from fusekit.capturing.store import Store
from fusekit.data.counts import DataCounts
from fusekit.data.prepare import prepare
from fusekit.data.reading import rows_of
from fusekit.data.settings import DataSettings
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.yaml import nearest


def capture_job(
    model: str | Path | ModelChoice,
    dataset: Any,
    out: str | Path,
    *,
    engine: str | Sequence[str] = "transformers",
    chat_template: str = "own",
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda _line: None,
    **settings: Any,
) -> Capture:
    """What :func:`capture` does, before it is done; the arguments are the same.

    A process that is given one share after the other runs them with one model:

    >>> from fusekit.api import capture_job
    >>> from fusekit.devices import Processes
    >>> texts = [{"text": "2+2="}, {"text": "3+3="}]
    >>> job = capture_job("demo/models/numbers", texts, folder, rows_per_shard=1, quiet=True)
    >>> [job.run(Processes.separate(rank, 2)).complete for rank in (1, 0)]
    [False, True]
    """
    cuts = ("max_length", "overlong", "train_on", "on_bad_row")
    known = (*cuts, *CaptureSettings.model_fields)
    if unknown := [name for name in settings if name not in known]:
        raise DataError(f"capture has no setting {unknown[0]!r}{nearest(unknown[0], known)}")
    try:
        data = DataSettings(path=".", **{name: settings.pop(name) for name in cuts if name in settings})
        how = CaptureSettings(**settings)
        urls = [engine] if isinstance(engine, str) else list(engine)
        where = EngineSettings(**({"url": urls} if "://" in urls[0] else {"name": urls[0]}))
    except ValidationError as error:
        wrong = [f"{found['loc'][0]} is {found['input']!r}: {found['msg']}" for found in error.errors()]
        raise DataError("; ".join(wrong)) from error
    choice = model if isinstance(model, ModelChoice) else ModelChoice(str(model), engine=where)
    checkpoint = find_checkpoint(choice)
    date = None if overwrite else date_of(Path(out))
    template = ChatTemplate.chosen(chat_template)
    tokenizer = RowTokenizer(load_tokenizer(checkpoint), template, data.train_on, date=date)
    counts = DataCounts(data.on_bad_row)
    prepared = prepare(rows_of(dataset, counts), [tokenizer], data.max_length, data.overlong, counts)
    if not prepared.rows:
        raise DataError(f"no example is left: {prepared.counts}")
    for line in counts.lines:
        say(line)
    return Capture(
        checkpoint,
        tokenizer,
        prepared.rows,
        out,
        how,
        details={"max_length": data.max_length, "overlong": data.overlong},
        overwrite=overwrite,
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
        overwrite: start over where there is a store.
        quiet: show no progress.
        say: called with lines for the user.
        settings: fields of :class:`~fusekit.capturing.settings.CaptureSettings` (top_k, temperature, ...), and
            ``max_length``, ``overlong``, ``train_on`` and ``on_bad_row`` of
            :class:`~fusekit.data.settings.DataSettings`.

    Returns:
        The store, which :class:`~fusekit.FusionTrainer` takes as a teacher.

    Raises:
        CaptureError: the model cannot be found or loaded, or does not fit.
        DataError: there is no example that can be read; an unknown setting, with the nearest name.
        StorageError: the store was made from other inputs (says which), or the disk fails.
    """
    return capture_job(model, dataset, out, **options).run()
