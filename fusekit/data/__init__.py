"""Rows of data: read, filtered, rendered under a chat template, tokenized with the place of every token."""

from fusekit.data.prepare import Prepared, pack_text, prepare
from fusekit.data.reading import DataCounts, read_rows
from fusekit.data.templates import ChatTemplate, template_names
from fusekit.data.tokenize import RowTokenizer

__all__ = [
    "ChatTemplate",
    "DataCounts",
    "Prepared",
    "RowTokenizer",
    "pack_text",
    "prepare",
    "read_rows",
    "template_names",
]
