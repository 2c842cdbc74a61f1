"""What a store says of itself: what it was made from, and what each shard holds."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusekit.artifacts import Inputs, differences
from fusekit.capturing.settings import DEFAULT_MAX_ERROR
from fusekit.disk import commit_file, disk_fault
from fusekit.errors import StorageError

MANIFEST = "manifest.json"
FORMAT = 2
ROWS_PER_SHARD = 1024
"""Unless something else is asked for; what chooses by model and device takes no more."""
KEY_BYTES = 16
_LARGEST_MANIFEST = 1 << 30

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Setting = str | int | float | bool | None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StoreSpec(_Model):
    """What a store is made from. Two runs with equal specs and equal rows make the same store, bit for bit.

    Attributes:
        model: name or path of the model, as the user wrote it.
        model_fingerprint: what identifies its weights (revision, hash).
        tokenizer: fingerprint of tokenizer, chat template and of which tokens are labels.
        data: fingerprint of the data.
        vocabulary: ids are below it.
        top_k: most entries per label.
        keep_mass: entries were kept until they hold this probability; None for always ``top_k``.
        temperature: of the log-probabilities.
        max_error: bound of the rows' rounding in nats, 0 for none (:class:`fusekit.capturing.codec.Codec`).
        rows_per_shard: of the data, quarantined ones included.
        details: whatever else decides what a store holds (dtype, maximal length, ...), by name.
    """

    model: str
    model_fingerprint: str = ""
    tokenizer: str = ""
    data: str = ""
    vocabulary: int = Field(ge=1, lt=1 << 31)
    top_k: int = Field(ge=1)
    keep_mass: float | None = Field(default=None, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    max_error: float = Field(default=DEFAULT_MAX_ERROR, ge=0, le=1)
    rows_per_shard: int = Field(default=ROWS_PER_SHARD, ge=1)
    details: dict[str, Setting] = Field(default_factory=dict)

    def differences(self, other: StoreSpec) -> list[str]:
        """One line per field that differs: ``top_k: 10, now 50``."""
        return differences(self.model_dump(), other.model_dump())


class Quarantined(_Model):
    """A row that the store does not hold, and why. row: its place in the data, from 0."""

    row: Count
    key: Hash
    reason: str


class ShardRecord(_Model):
    """A shard that was committed: for the rows ``start`` to ``stop`` of the data, of which it lacks the quarantined.

    size: bytes of the file. xxh3, footer_xxh3: xxh3-128 of it and of its Parquet footer. bytes: of content that its
    labels cover.
    """

    file: str = Field(pattern=r"^shard-[0-9]{5,}\.parquet$")
    size: Count
    xxh3: Hash
    footer_xxh3: Hash
    start: Count
    stop: Count
    rows: Count
    tokens: Count
    labels: Count
    bytes: Count
    quarantined: list[Quarantined]

    def is_there(self, folder: Path) -> bool:
        """Whether the file is there, as far as its size tells. Raises StorageError when the disk fails."""
        path = folder / self.file
        try:
            return path.stat().st_size == self.size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error


class CommittedShard(_Model):
    """``shard-00000.json``: a shard's record while the store is not complete, with the hash of its plan."""

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    plan_xxh3: Hash
    shard: ShardRecord


class Manifest(_Model):
    """``manifest.json``.

    complete: whether ``shards`` has them all; before, shards are recorded here or in a file of their own. bounds: shard
    i is for the rows ``bounds[i]`` to ``bounds[i + 1]``. keys_xxh3: see :func:`keys_hash`. made: what may differ
    between equal stores.
    """

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    complete: bool
    spec: StoreSpec
    bounds: list[Count] = Field(min_length=1)
    keys_xxh3: Hash
    shards: list[ShardRecord]
    made: dict[str, Setting] = Field(default_factory=dict)

    def changes(self, made_from: Inputs, keys: Sequence[str]) -> list[str]:
        """A line for each difference from what the store would be made from now: ``top_k: 10, now 50``.

        made_from: fields of a spec. keys: of the rows. Raises StorageError for what is not a key.
        """
        changed = differences(self.spec.model_dump(), made_from)
        if not changed and len(keys) != self.bounds[-1]:
            return [f"rows: {self.bounds[-1]}, now {len(keys)}"]
        if not changed and keys_hash(keys) != self.keys_xxh3:
            return ["rows: others, or in another order"]
        return changed


AnyModel = TypeVar("AnyModel", bound=_Model)


def key_bytes(key: str) -> bytes:
    """The 16 bytes of a row's key. Raises StorageError for anything but 32 lower-case hexadecimal digits."""
    try:
        data = bytes.fromhex(key)
    except ValueError:
        data = b""
    if len(data) != KEY_BYTES or data.hex() != key:
        raise StorageError(f"a row has the key {key!r}, but keys are 32 hexadecimal digits (Row.key)")
    return data


def plan_hash(spec: StoreSpec, keys_xxh3: str) -> str:
    """xxh3-128 of a spec's JSON and of the hash of the keys."""
    return xxhash.xxh3_128_hexdigest(_json(spec) + keys_xxh3.encode())


def keys_hash(keys: Sequence[str]) -> str:
    """xxh3-128 of rows' keys in order, 16 bytes each. Raises StorageError for what is not a key."""
    return xxhash.xxh3_128_hexdigest(b"".join(map(key_bytes, keys)))


def shard_name(index: int) -> str:
    """The file of shard number ``index``; its record is the same with ``.json``."""
    return f"shard-{index:05}.parquet"


def own_record(folder: Path, name: str, plan_xxh3: str) -> ShardRecord | None:
    """The record that a shard has in a file of its own, if it was written for this plan. Raises StorageError."""
    committed = read_json((folder / name).with_suffix(".json"), CommittedShard)
    return committed.shard if committed and committed.plan_xxh3 == plan_xxh3 else None


def _json(model: BaseModel) -> bytes:
    return (json.dumps(model.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def write_json(path: Path, model: BaseModel, rank: int = 0) -> None:
    """Commit a model as JSON. Raises StorageError when the disk fails."""
    commit_file(path, lambda file: file.write(_json(model)), rank=rank)


def read_json(path: Path, kind: type[AnyModel]) -> AnyModel | None:
    """A model from JSON, None where there is no file. Raises StorageError naming the file and what is wrong in it."""
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise StorageError(f"{path} is damaged: it has {path.stat().st_size} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_fault(error, path) or StorageError(f"{path}: cannot be read: {error}") from error
    try:
        found = json.loads(data)
        version = found.get("format") if isinstance(found, dict) else None
        if isinstance(version, int) and version != FORMAT and "spec" in found:
            advice = "update fusekit" if version > FORMAT else "capture it again with --overwrite"
            raise StorageError(f"{path} has format {version}, but this version of fusekit reads {FORMAT}: {advice}")
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{path} is damaged: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: {error}") from error


def date_of(store: Path) -> datetime.date | None:
    """The day that the chat template printed when a capture was begun, to be printed again; None where there is none.

    Raises StorageError for a damaged manifest.
    """
    from fusekit.data.templates import kept_date

    known = read_json(store / MANIFEST, Manifest)
    return None if known is None else kept_date(known.spec.details.get("date"))
