"""What the sources know: rows of data in, each model's tokens with their coordinates, top-k rows out.

``rows``: conversations and texts. ``reading``: from files and the hub. ``row_tokenizer``: a row as one model reads it
(``tokenized_row``), under a ``chat_template``. ``filters``, ``blocks``: the rows of a run, the same bytes for every
model. None of them needs torch.
"""

from fusekit.representation.blocks import pack_text
from fusekit.representation.chat_template import ChatTemplate, template_names
from fusekit.representation.filters import DataCounts, Prepared, prepare
from fusekit.representation.reading import read_rows
from fusekit.representation.row_tokenizer import RowTokenizer
from fusekit.representation.rows import Cut, Message, Row
from fusekit.representation.tokenized_row import CapturedRow, Part, TokenizedRow

__all__ = [
    "CapturedRow",
    "ChatTemplate",
    "Cut",
    "DataCounts",
    "Message",
    "Part",
    "Prepared",
    "Row",
    "RowTokenizer",
    "TokenizedRow",
    "pack_text",
    "prepare",
    "read_rows",
    "template_names",
]
