"""SCE, VaRM and WIDEN: merging the fine-tunes of one model, matrix by matrix.

Importing this package registers `fusechat_sce`, `varm` and `widen` with mergekit, of which the functions know nothing.
"""

from fusekit.merge_methods.provenance import MergeRecord, TensorRecord, record_coefficients
from fusekit.merge_methods.sce import SCEMerge, Variant, sce, select
from fusekit.merge_methods.varm import (
    Aggregation,
    Granularity,
    MatrixStatistics,
    VaRMMerge,
    matrix_statistics,
    unit_coefficients,
    unit_of,
    varm,
    varm_elementwise,
)
from fusekit.merge_methods.widen import WidenMerge, widen
from fusekit.mergekit_plugin import register as _register

__all__ = [
    "Aggregation",
    "Granularity",
    "MatrixStatistics",
    "MergeRecord",
    "SCEMerge",
    "TensorRecord",
    "VaRMMerge",
    "Variant",
    "WidenMerge",
    "matrix_statistics",
    "record_coefficients",
    "sce",
    "select",
    "unit_coefficients",
    "unit_of",
    "varm",
    "varm_elementwise",
    "widen",
]

_register()
