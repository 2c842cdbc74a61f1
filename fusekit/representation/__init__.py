"""What the sources know: rows of data in, each model's tokens with their coordinates, top-k rows out.

``rows``: conversations and texts. ``tokenized_row``: a row as one model reads it. Neither needs torch.
"""

from fusekit.representation.rows import Cut, Message, Row
from fusekit.representation.tokenized_row import CapturedRow, Part, TokenizedRow

__all__ = ["CapturedRow", "Cut", "Message", "Part", "Row", "TokenizedRow"]
