"""Slow, obvious truth: what each prefix of tokens has consumed, plain dynamic programmes, plain loops.

Nothing here uses fusekit. The bytes of a token come from the tokenizer's own strings, token by token; where a prefix
decodes cleanly it is checked against the tokenizer's ``decode``.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


@functools.cache
def _kind(tokenizer: Any) -> tuple[dict[int, bytes], bool]:
    added = {id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()}
    return added, "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def token_bytes(tokenizer: Any, id_: int) -> bytes:
    """The bytes of one token, from its string."""
    added, byte_level = _kind(tokenizer)
    string = tokenizer.convert_ids_to_tokens(id_)
    if id_ in added:
        return added[id_]
    if byte_level:
        return bytes(ALPHABET[c] for c in string)
    if len(string) == 6 and string.startswith("<0x") and string.endswith(">"):
        return bytes([int(string[3:5], 16)])
    return string.replace("▁", " ").encode()


def consumed_prefixes(tokenizer: Any, text: str) -> list[bytes]:
    """What each prefix of the tokens has consumed, in bytes of the text as the tokenizer normalises it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = normalized(tokenizer, text).encode()
    prefixes, so_far = [], b""
    for n, id_ in enumerate(ids):
        so_far += token_bytes(tokenizer, id_)
        seen = so_far
        # A text that holds the space mark itself reads as spaces; the comparison is by characters then.
        if seen.startswith(b" ") and not _reads_as(wanted, seen):
            seen = seen[1:]  # the dummy prefix
        length = _reads_as(wanted, seen)
        assert length is not None, (tokenizer.name_or_path, text, seen, wanted)
        prefixes.append(wanted[:length])
        decoded = tokenizer.decode(ids[: n + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in decoded and "▁" not in text:
            assert prefixes[-1].decode() in (decoded, " " + decoded), (tokenizer.name_or_path, decoded)
    return prefixes


def _reads_as(wanted: bytes, seen: bytes) -> int | None:
    """Length of the beginning of ``wanted`` that reads as ``seen`` where marks may read as spaces, None if none."""
    at = 0
    for byte in seen:
        if wanted[at : at + 1] == bytes([byte]):
            at += 1
        elif byte == 32 and wanted[at:].startswith("▁".encode()):
            at += 3
        else:
            return None
    return at


def normalized(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer sees it, by Python's own Unicode tables."""
    name = tokenizer.name_or_path
    form = {"anthropic": "NFKC", "qwen": "NFC"}.get(name)
    return unicodedata.normalize(form, text) if form else text


def original_ends(tokenizer: Any, text: str) -> list[int | None]:
    """Where each token ends in the original bytes; None where it ends at no place of it."""
    prefixes = consumed_prefixes(tokenizer, text)
    if normalized(tokenizer, text) == text:
        return [len(prefix) for prefix in prefixes]
    cuts = safe_cuts(tokenizer, text)
    return [original_end(tokenizer, text, prefix, cuts) for prefix in prefixes]


def safe_cuts(tokenizer: Any, text: str) -> dict[int, bytes]:
    """Characters after which the text can be cut: both parts normalise by themselves. With the first part's form."""
    whole, cuts = normalized(tokenizer, text), {}
    for stop in range(len(text) + 1):
        image = normalized(tokenizer, text[:stop])
        if image + normalized(tokenizer, text[stop:]) == whole:
            cuts[stop] = image.encode()
    return cuts


def original_end(tokenizer: Any, text: str, prefix: bytes, cuts: dict[int, bytes]) -> int | None:
    """Bytes of the original text that read as ``prefix`` once normalised; None where no beginning of it does."""
    for stop, image in cuts.items():
        if image == prefix:
            return len(text[:stop].encode())
        if not prefix.startswith(image) or stop + 1 not in cuts:
            continue
        character, rest = text[stop].encode(), prefix[len(image) :]
        if cuts[stop + 1] == image + character and len(rest) < len(character) and character.startswith(rest):
            return len(text[:stop].encode()) + len(rest)
    return None


def links(pivot_ends: list[int | None], source_ends: list[int | None]) -> list[int]:
    """Per pivot position the last source position with the same end; of equal pivot ends only the last has one."""
    found = []
    for i, end in enumerate(pivot_ends):
        same = [j for j, other in enumerate(source_ends) if end is not None and other == end]
        later = end in pivot_ends[i + 1 :]
        found.append(same[-1] if same and not later else -1)
    return found


def levenshtein(a: str, b: str) -> int:
    """Edit distance, the textbook table."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def token_cost(pivot: bytes, source: bytes) -> int:
    """Levenshtein distance of two tokens without word-start marks, unless one of them is nothing else."""
    a, b = pivot.removeprefix(b" "), source.removeprefix(b" ")
    if not a or not b:
        a, b = pivot, source
    try:
        return levenshtein(a.decode(), b.decode())
    except UnicodeDecodeError:
        return levenshtein(a.decode("latin-1"), b.decode("latin-1"))


def warp(costs: list[list[int]]) -> list[tuple[int, int]]:
    """Dynamic time warping cell by cell; going back: diagonal, then pivot - 1, then source - 1."""
    n, m = len(costs), len(costs[0])
    table = [[math.inf] * m for _ in range(n)]
    for i in range(n):
        for j in range(m):
            options = [
                table[i - 1][j] if i else math.inf,
                table[i][j - 1] if j else math.inf,
                table[i - 1][j - 1] if i and j else math.inf,
            ]
            table[i][j] = costs[i][j] + (0 if i == j == 0 else min(options))
    i, j = n - 1, m - 1
    path = [(i, j)]
    while i or j:
        diagonal = table[i - 1][j - 1] if i and j else math.inf
        up = table[i - 1][j] if i else math.inf
        left = table[i][j - 1] if j else math.inf
        best = min(diagonal, up, left)
        if diagonal == best:
            i, j = i - 1, j - 1
        elif up == best:
            i -= 1
        else:
            j -= 1
        path.append((i, j))
    return path[::-1]


def project(
    targets: Sequence[int], ids: list[int], logprobs: list[float], tail: float, keep_largest: bool
) -> tuple[dict[int, float], float]:
    """One row through a map, a pivot id or -1 per source id: ({pivot id: probability}, tail)."""
    entries: dict[int, list[float]] = {}
    for id_, logprob in zip(ids, logprobs, strict=True):
        if id_ >= 0 and targets[id_] >= 0:
            entries.setdefault(targets[id_], []).append(math.exp(logprob))
        elif id_ >= 0:
            tail += math.exp(logprob)
    if not keep_largest:
        return {target: math.fsum(parts) for target, parts in entries.items()}, tail
    lost = sum(math.fsum(parts) - max(parts) for parts in entries.values())
    return {target: max(parts) for target, parts in entries.items()}, tail + lost


class RowReference:
    """Targets at one pivot position, from ends, surfaces and rows, in plain loops."""

    def __init__(self, text: bytes, alignment: Any, of: list[bytes], map_id: Any, map_rest: Any) -> None:
        self.text, self.of, self.map_id, self.map_rest = text, of, map_id, map_rest
        self.pivot_ids, self.source_ids = alignment.pivot_ids.tolist(), alignment.source_ids.tolist()
        self.pivot_ends, self.source_ends = alignment.pivot_ends.tolist(), alignment.source_ends.tolist()

    def row(
        self,
        i: int,
        rows: list[tuple[dict[int, float], float]],
        actual: list[float],
        kind: str = "listed_share",
        own: tuple[list[tuple[dict[int, float], float]], list[float | None]] | None = None,
    ) -> dict[int, float] | None:
        """``rows[j]`` is ({source id: probability}, tail), ``actual[j]`` the probability of source token j + 1.

        kind: what becomes of the tail. own: the same of the pivot, whose probabilities may be None.
        """
        end = self.pivot_ends[i]
        before = [j for j, other in enumerate(self.source_ends) if other <= end]
        if i + 1 >= len(self.pivot_ids) or not before or before[-1] + 1 >= len(self.source_ids):
            return None
        base = before[-1]
        read = self.text[self.source_ends[base] : end]
        label_end, label = self.pivot_ends[i + 1], self.pivot_ids[i + 1]
        entries, tail = dict(rows[base][0]), rows[base][1]
        following = self.source_ids[base + 1]
        if following in entries:
            certain = entries.pop(following)
        else:
            certain = min(actual[base], tail)
            tail -= certain
        share = certain
        for j in range(base + 2, len(self.source_ids) + 1):
            start = self.source_ends[j - 1]
            if start >= label_end:
                break
            if self.source_ends[j] <= label_end:
                share *= actual[j - 1]
            else:  # t ends inside token j
                left = self.text[start:label_end]
                listed = dict(rows[j - 1][0])
                known = listed.pop(self.source_ids[j], min(actual[j - 1], rows[j - 1][1]))
                share *= known + sum(p for id_, p in listed.items() if self.of[id_].startswith(left))
        if read:
            tail *= self.staying(i, base, certain, entries, kind, own)
        target: dict[int, float] = {label: share, -1: certain - share}
        if kind == "back_off" and own is not None and own[1][i] is not None:
            theirs, left = dict(own[0][i][0]), own[0][i][1]
            if label not in theirs:
                theirs[label] = min(own[1][i], left)
                left -= theirs[label]
            for id_, probability in theirs.items():
                target[id_] = target.get(id_, 0.0) + tail * probability
            tail *= left
        target[-1] += tail
        for id_, probability in entries.items():
            if not self.of[id_].startswith(read):
                continue
            to = self.map_id(id_) if not read else self.map_rest(self.of[id_][len(read) :])
            target[to] = target.get(to, 0.0) + probability
        total = sum(target.values()) if read else 1.0
        return {to: p / total for to, p in target.items()}

    def staying(self, i: int, base: int, certain: float, entries: dict[int, float], kind: str, own: Any) -> float:
        """The share of the tail that begins with the bytes read since ``base``."""
        if kind in ("keep", "drop"):
            return float(kind == "keep")
        read = self.text[self.source_ends[base] : self.pivot_ends[i]]
        kept = certain + sum(p for id_, p in entries.items() if self.of[id_].startswith(read))
        listed = kept / (certain + sum(entries.values()))
        if kind == "listed_share":
            return listed
        before = [q for q in range(i + 1) if self.pivot_ends[q] <= self.source_ends[base]]
        # Without a position at the end of base: the tokens after the one that crosses it.
        at_end = before and self.pivot_ends[before[-1]] == self.source_ends[base]
        first = before[-1] if at_end else len(before)
        product = 1.0
        for q in range(first, i):
            if own[1][q] is None:
                return listed
            product *= own[1][q]
        return product if first < i else listed
