"""Fuse the knowledge of several large language models into one.

``fusekit.merge_methods``: SCE and VaRM, as functions and as mergekit merge methods.
``fusekit.alignment``: exact alignment of any two tokenizers.

``import fusekit`` loads neither torch nor transformers; the subpackages load what they need when they are imported.
"""

__version__ = "0.1.0.dev0"
