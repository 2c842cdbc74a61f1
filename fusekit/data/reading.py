"""Rows from files and from the Hugging Face hub, one after the other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fusekit.data.counts import DataCounts
from fusekit.data.formats import ACCEPTED, form_of, parse_record
from fusekit.errors import DataError
from fusekit.types import TEXT, Message, Row

MAX_DESCRIPTION = 64 << 20  # bytes of a manifest.json or config.json that is read to tell what a folder is

Record = tuple[str, Any]
"""Where it is, for errors, and what it is; a DataError where it cannot be read, but those after it can."""


def read_rows(
    path: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    name: str | None = None,
    counts: DataCounts | None = None,
) -> Iterator[Row]:
    """Read conversations or plain text, lazily: a large JSONL or Parquet file is never in memory as a whole.

    Args:
        path: a ``.jsonl``, ``.json`` (a list, ``{"data": [...]}``, or JSON lines), ``.parquet`` or ``.txt`` file (one
            document), a folder of such files (in order of their names), or the id of a data set on the hub; or several
            of these, one after the other.
        split, revision, name, streaming: of the data set on the hub; ``name`` is its configuration.
        limit: read at most so many rows; None for all.
        counts: what unusable examples (where its ``on_bad_row`` says ``skip``) and unused fields are counted in.

    Returns:
        The rows in order. ``Row.dataset`` is the record's ``dataset`` field, or else the file's name without its
        ending, or the id on the hub. The form is found once per file, by the keys of its first row.

    Raises:
        DataError: while iterating (for a missing file at once): names file and line, what was found, and the way out.
    """
    counts = DataCounts() if counts is None else counts
    if limit is not None and limit < 0:
        raise DataError(f"limit is {limit}: it is a number of examples, or None for all")
    limit = limit and min(limit, sys.maxsize)  # islice takes no larger one
    if not isinstance(path, (str, Path)):
        how: dict[str, Any] = {"split": split, "revision": revision, "name": name, "streaming": streaming}
        rows: Iterator[Row] = (row for one in path for row in read_rows(one, counts=counts, **how))
        return islice(rows, limit)
    local = Path(path).expanduser()
    if local.is_dir():
        rows = (row for file in files_of(path) for row in _rows_of_file(Path(file), counts))
    elif local.exists():
        rows = _rows_of_file(local, counts)
    elif isinstance(path, Path) or not is_on_hub(path):
        raise DataError(f"{path} does not exist")
    else:
        records = hub_records(path, split=split, revision=revision, name=name, streaming=streaming)
        rows = rows_of_records(records, path, counts)
    return islice(rows, limit)


def rows_of(dataset: Any, counts: DataCounts | None = None) -> Iterator[Row]:
    """The rows of whatever holds examples.

    Args:
        dataset: a ``datasets.Dataset``, or any iterable of mappings with the columns of a file's records (messages,
            ShareGPT's conversations, instruction triples, text), of rows, or a path or name as for :func:`read_rows`,
            or several of those.
        counts: as for :func:`read_rows`.

    Raises:
        DataError: no example that can be read; names its number and its columns.
    """
    counts = DataCounts() if counts is None else counts
    if isinstance(dataset, (str, Path)):
        yield from read_rows(dataset, counts=counts)
        return
    if not isinstance(dataset, Iterable) or isinstance(dataset, Mapping):
        raise DataError(
            f"{type(dataset).__name__} holds no examples: give a datasets.Dataset, the path of a file, or a list of "
            f"records with {ACCEPTED}"
        )

    def records() -> Iterator[Record]:
        for number, record in enumerate(dataset, 1):
            if isinstance(record, (str, Path)):
                yield from ((str(record), row) for row in read_rows(record, counts=counts))
            else:
                yield f"example {number}", record

    yield from rows_of_records(records(), "", counts)


def rows_of_records(records: Iterable[Record], dataset: str, counts: DataCounts) -> Iterator[Row]:
    """The rows of records of one form, which the first usable one tells; rows among them as they are.

    dataset: of rows whose record names none. counts: as for :func:`read_rows`.
    """
    form = None
    for where, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            if not isinstance(record, Row):
                form = form or form_of(record, where)
                record = parse_record(record, form, where, dataset, counts)  # noqa: PLW2901
        except DataError as error:
            counts.unusable(error)
        else:
            yield record


def files_of(path: str | Path) -> list[str | Path]:
    """The files of rows in a folder, in order of their names; anything else as it is.

    Raises DataError for a folder without such a file, or of something else.
    """
    local = Path(path).expanduser()
    if not local.is_dir():
        return [path]
    manifest = _mapping(local / "manifest.json")
    if (local / "rows.jsonl").is_file() and manifest.get("stage") == "data":
        return [local / "rows.jsonl"]  # what a run prepared
    if other := _other_folder(local, manifest):
        raise DataError(
            f"{path} is {other}, not examples of data: give files of examples ({', '.join(READERS)}), a folder of such "
            "files, or the id of a data set on the hub"
        )
    files = sorted(file for file in local.iterdir() if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise DataError(f"{local} is a folder without a file that ends in {', '.join(READERS)}")
    return list(files)


def is_on_hub(path: str) -> bool:
    """Whether rows are taken for a data set on the hub: nothing is there, and it does not look like a file."""
    local = Path(path).expanduser()
    return not (local.exists() or local.suffix.lower() in READERS or path.startswith((".", "/", "~")))


def no_data_set(name: str) -> str | None:
    """Why a name is not taken for a data set on the hub, which is not asked: it is no id, or one without an owner.

    The hub knows some data sets without their owners, too; such a one is taken if it is in the cache.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"{name!r} is neither a file or folder nor the id of a data set (owner/name)"
    if "/" in name:
        return None
    import datasets

    if (Path(datasets.config.HF_DATASETS_CACHE) / name).is_dir():
        return None
    return (
        f"there is no file or folder {name!r} here: write a file with its ending ({', '.join(READERS)}), and a data "
        f"set on the hub with its owner (OWNER/{name})"
    )


def _other_folder(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What a folder is that holds JSON files of something else; None where it may hold rows."""
    if (folder / "recipe.resolved.yml").is_file():
        return "the output of a run"
    if "stage" in manifest:
        return f"what the stage {str(manifest['stage'])!r} of a run made"
    if "spec" in manifest:
        return "a store of what a model said about examples"
    if {"model_type", "architectures"} & _mapping(folder / "config.json").keys():
        return "a model"
    return "an adapter of a model" if (folder / "adapter_config.json").is_file() else None


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size < MAX_DESCRIPTION else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows_of_file(file: Path, counts: DataCounts) -> Iterator[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file} ends in {file.suffix!r}: files of examples end in {', '.join(READERS)}")
    return rows_of_records(_guarded(reader, file), file.stem, counts)


def _guarded(reader: Callable[[Path], Iterable[Record]], file: Path) -> Iterator[Record]:
    try:
        yield from reader(file)
    except (OSError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{file} cannot be read: {reason}") from error


def _decoded(data: bytes, file: Path, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line, start = line + data.count(b"\n", 0, error.start), data.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: invalid UTF-8 at byte {error.start - start} of the line: convert the file"
        ) from error


def _loaded(data: bytes, file: Path, line: int = 1) -> Any:
    """The value of JSON text that begins at a line of a file."""
    try:
        return json.loads(_decoded(data, file, line))
    except json.JSONDecodeError as error:
        whole = file.suffix == ".jsonl" and line == 1 and data.strip() in (b"[", b"{")
        hint = ": a file of one JSON value over several lines has to end in .json" if whole else ""
        raise DataError(
            f"{file}, line {line + error.lineno - 1}: invalid JSON: {error.msg} (column {error.colno}){hint}"
        ) from error
    except ValueError as error:  # numbers of too many digits
        raise DataError(f"{file}, line {line}: invalid JSON: {error}") from error


def _json_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(_BLANK):
                try:
                    # Without its end, else a line that is cut short is said to be wrong in the next one.
                    record = _loaded(line.rstrip(b"\r\n"), file, number)
                except DataError as error:
                    record = error
                yield f"{file}, line {number}", record


_BLANK = b"\xef\xbb\xbf \t\r\n"


def _json(file: Path) -> Iterator[Record]:
    """A list of rows, alone or under ``data``; JSON lines with the ending ``.json`` too, as data sets often have it."""
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip(_BLANK)), b"")
    try:
        record = json.loads(first.decode("utf-8-sig"))
    except ValueError:  # a value over several lines
        record = None
    if isinstance(record, dict) and not isinstance(record.get("data"), list):
        yield from _json_lines(file)
        return
    rows = _loaded(file.read_bytes(), file)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise DataError(f"{file} is one JSON value: examples are a list, a list under 'data', or one object a line")
    for number, row in enumerate(rows, 1):
        yield f"{file}, example {number}", row


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}, after row {number}: not readable as Parquet: {error}") from error


def _text(file: Path) -> Iterator[Record]:
    """The whole file is one document."""
    yield str(file), Row((Message(TEXT, _decoded(file.read_bytes(), file)),), file.stem)


def json_lines(file: Path) -> Iterator[Record]:
    """The values of a file of JSON lines; blank lines are none. Raises DataError where the file cannot be read."""
    return _guarded(_json_lines, file)


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
}
"""Endings of files of examples."""


def hub_records(
    repository: str, *, split: str, revision: str | None, name: str | None, streaming: bool
) -> Iterator[Record]:
    """The records of a data set, with where each is. No code of the data set is run.

    Raises DataError while iterating, with a hint: offline, gated, missing, several configurations, no such split.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from fusekit.hub import unreachable

    cached = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")
    try:
        validate_repo_id(repository)
        if not constants.is_offline_mode():
            try:  # one short question, since ``datasets`` asks an unreachable hub again and again
                timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
                huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=timeout)
            except Exception as error:
                if not unreachable(error) or not cached.is_dir():
                    raise
        data = datasets.load_dataset(repository, name, split=split, revision=revision, streaming=streaming)
        for number, record in enumerate(data, 1):
            yield f"{repository} ({split}), row {number}", record
    except HFValidationError as error:
        raise DataError(f"{repository!r} is neither a file or folder nor the id of a data set (owner/name)") from error
    except Exception as error:  # the client's own, its HTTP library's, pyarrow's
        reason = _explained(error, repository, revision, name, split)
        raise DataError(f"{repository} {reason}") from error


def _explained(error: BaseException, repository: str, revision: str | None, name: str | None, split: str) -> str:
    """What an exception of ``datasets`` or the hub client means, and what to do about it."""
    import huggingface_hub
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants, errors

    from fusekit.hub import unreachable

    chain = [error]
    while len(chain) < 10 and (link := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(link)

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    hub, said = constants.ENDPOINT, " ".join(str(error).split())
    page = f"{hub}/datasets/{repository}"
    token = "a token is set" if huggingface_hub.get_token() else "no token is set"
    log_in = f"log in with `hf auth login` or set HF_TOKEN ({token})"
    silent = f"{hub} does not answer ({type(error).__name__}: {said}): check the network, a proxy, or HF_ENDPOINT"
    uncached = (
        f"is not in the cache of data sets ({HF_DATASETS_CACHE}) and HF_HUB_OFFLINE is set: unset it once, or fetch "
        f"its files where there is a network (`hf download {repository} --repo-type dataset --local-dir ROWS`) and "
        "give the folder that holds them as the path"
    )
    missing = f"is neither a file or folder nor a data set on {hub}: check the spelling; if it is private, {log_in}"
    of_its_own = f"is made by code of its own, which fusekit does not run: fetch its files and give their path ({said})"
    cases = (
        (has(errors.GatedRepoError), f"is gated: accept its terms at {page}, then {log_in}"),
        (constants.is_offline_mode(), uncached),
        (has(errors.RevisionNotFoundError), f"has no revision {revision!r}: see {page}/commits/main"),
        (has(errors.RepositoryNotFoundError), missing),
        (
            "Config name is missing" in said or "BuilderConfig" in said,
            f"needs the name of one of its configurations, not {name!r}: {said}",
        ),
        ("split" in said.lower() and isinstance(error, ValueError), f"has no split {split!r}: {said}"),
        (any(map(unreachable, chain)), f"is not a file or folder, and {silent}"),
        ("script" in said.lower(), of_its_own),
        (True, f"cannot be read from {hub}: {type(error).__name__}: {said}"),
    )
    return next(text for applies, text in cases if applies)
