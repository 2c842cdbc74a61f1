"""The commit protocol and the top-k store: what was committed survives, what was not leaves no trace.

``publish``: build a folder beside its final path and move it there in one step. ``commit``: the same for one file.
``lock``: one writer per output. ``store``: what a model said about rows of data, written shard by shard
(:class:`StoreWriter`), read by number or key (:class:`Store`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusekit.storage.commit import commit_file
from fusekit.storage.faults import disk_fault
from fusekit.storage.lock import output_lock
from fusekit.storage.publish import Staging, recover, staging

if TYPE_CHECKING:
    from fusekit.storage.codec import Codec
    from fusekit.storage.combine import combine_stores
    from fusekit.storage.export import export_parquet
    from fusekit.storage.manifest import StoreSpec
    from fusekit.storage.store import Problem, Store, Summary
    from fusekit.storage.writer import ShardPlan, StoreWriter, remove_store

# The store needs numpy, pydantic and the alignment's types, which a merge does without.
_LAZY = {
    "Codec": "codec",
    "Problem": "store",
    "ShardPlan": "writer",
    "Store": "store",
    "StoreSpec": "manifest",
    "StoreWriter": "writer",
    "Summary": "store",
    "combine_stores": "combine",
    "export_parquet": "export",
    "remove_store": "writer",
}

__all__ = [
    "Codec",
    "Problem",
    "ShardPlan",
    "Staging",
    "Store",
    "StoreSpec",
    "StoreWriter",
    "Summary",
    "combine_stores",
    "commit_file",
    "disk_fault",
    "export_parquet",
    "output_lock",
    "recover",
    "remove_store",
    "staging",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
