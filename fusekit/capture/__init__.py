"""What a model says about rows: the forward pass, top-k rows, and the store that keeps them."""

from fusekit.capture.combine import combine_stores
from fusekit.capture.export import export_parquet
from fusekit.capture.store import Store

__all__ = ["Store", "combine_stores", "export_parquet"]
