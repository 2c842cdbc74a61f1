"""The slow, obvious truth about a row's tokens: what their surfaces spell."""

from __future__ import annotations

from fusekit.data.tokenize import RowTokenizer
from fusekit.types import Part, Row, TokenizedRow


def assert_spans(
    row: Row, tokens: TokenizedRow, model: RowTokenizer, end: str | None, *, trims: bool = False, swallows: bool = False
) -> None:
    """Hold a row's tokens against its contents. end: the end of an answer, as the model writes it; None for none.

    trims: the template strips contents. swallows: a special token takes the white space after it.
    """
    surfaces, ids = model.encoder.surfaces.of, tokens.ids.tolist()
    assert len(tokens) == len(tokens.message) == len(tokens.part) == len(tokens.ends) == len(tokens.labels)
    assert (tokens.message[1:] >= tokens.message[:-1]).all()
    assert not tokens.labels[0]
    for number, message in enumerate(row.messages):
        content = message.content.encode()
        shown = message.content.strip() if trims else message.content.lstrip() if swallows else message.content
        dropped = len(message.content.encode()) - len(
            (message.content.lstrip() if trims or swallows else message.content).encode()
        )
        kept = shown.encode()
        mine = [i for i in range(len(tokens)) if tokens.message[i] == number]
        inside = [i for i in mine if tokens.part[i] == Part.CONTENT]
        spelled = b"".join(surfaces[ids[i]] for i in inside)
        # A first token may begin in the template: with a space, or a line feed that merges with the content's own.
        front = spelled.find(kept) if kept else 0
        assert front == 0 or 0 < front < len(surfaces[ids[inside[0]]]), (number, spelled, kept)
        assert spelled[front:].startswith(kept), (number, spelled, kept)
        consumed = -front
        for i in inside:
            consumed += len(surfaces[ids[i]])
            if consumed >= len(kept):
                assert tokens.ends[i] == len(content)
                assert tokens.lows[i] == dropped + len(kept)
            else:
                assert tokens.ends[i] == tokens.lows[i] == dropped + consumed
        ending = [i for i in mine if tokens.part[i] == Part.END]
        assert all(tokens.ends[i] == len(content) for i in ending)
        learned = b"".join(surfaces[ids[i]] for i in mine if tokens.labels[i])
        if message.role != "assistant":
            assert learned == b"", (number, learned)
        else:
            whole = kept + (end or "").encode()
            first = next(i for i in mine if tokens.labels[i])
            assert learned.endswith(whole), (number, learned, whole)
            assert len(learned) - len(whole) <= len(surfaces[ids[first]]) - (tokens.part[first] == Part.CONTENT)
            assert [tokens.labels[i] for i in ending] == [True] * len(ending)
            assert len(ending) == (end is not None)
