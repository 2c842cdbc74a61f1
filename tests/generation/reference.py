"""Ensembles the slow way: every model reads its whole text again at every step, no caches, nothing cropped.

For the demo's models, whose tokenizers write any text by themselves. float64 where the code has float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fusekit.alignment import build_vocabulary_map, vocabulary_surfaces

END = None
QUESTIONS = ["57+68=", "Capital of Peru?", "def close(self):", "Weather in Oslo in May?", "Reverse: k b x q"]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], ends: set[int], most: int) -> list[int]:
    """The most probable tokens up to an end, every one by a pass over all that was written."""
    written: list[int] = []
    while len(written) < most and not ends & {*written[-1:]}:
        written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


@dataclass
class Model:
    name: str
    model: Any
    tokenizer: Any
    question: str
    lead: str = ""  # neox writes a space before an answer

    @cached_property
    def prompt(self) -> list[int]:
        chat = [{"role": "user", "content": self.question}]
        return list(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    @cached_property
    def surfaces(self):
        return vocabulary_surfaces(self.tokenizer)

    @cached_property
    def ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends)

    @cached_property
    def writable(self) -> np.ndarray:
        mask = np.zeros(self.model.config.vocab_size, bool)
        for surface, id_ in self.surfaces.id_of.items():
            begun = [surface + (a + 2 * b"\x80")[:n] for a in (b"\x80", b"\xbf") for n in range(4)]
            mask[id_] = any(is_utf8(data) for data in begun) and id_ not in self.ends
        return mask

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def byte_ends(self, text: str) -> list[int]:
        return np.cumsum([len(self.surfaces.of[id_]) for id_ in self.tokens(text)]).tolist()

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> np.ndarray:
        """[len(ids) + 1, V], row i is what follows the first i tokens."""
        logits = self.model(torch.tensor([self.prompt + ids])).logits[0].double().log_softmax(-1)
        return logits[len(self.prompt) - 1 :].numpy()

    def expects(self, ids: list[int], need: str = "") -> tuple[np.ndarray, float]:
        """Probabilities of tokens that may follow, and of the end of the turn."""
        p = np.exp(self.logprobs(ids)[-1])
        end, of = p[self.ends].sum(), self.surfaces.of
        fits = np.array([of[i].startswith(need.encode()) or need.encode().startswith(of[i]) for i in range(len(of))])
        p = np.where(self.writable & fits, p, 0.0)
        return p / (p.sum() + end), end / (p.sum() + end)

    def first_piece(self, text: str) -> int:
        if text.encode() in self.surfaces.id_of:
            return self.surfaces.id_of[text.encode()]
        before = self.tokens("x =")  # no token of a text begins within it
        return self.tokens("x =" + text)[len(before)]


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def unite(models: list[Model], steps: int, top_k: int) -> tuple[str, list[float]]:
    text, scores = "", []
    for _ in range(steps):
        rows, needs = [], []
        for m in models:
            ids, need = (m.tokens(m.lead + text), "") if text else ([], m.lead)
            p, end = m.expects(ids, need)
            while need and p.max() > end and m.surfaces.of[int(p.argmax())] == need.encode():
                ids, need = [*ids, int(p.argmax())], ""
                p, end = m.expects(ids)
            rows.append((p, end))
            needs.append(need)
        options: set[str | None] = set()
        for m, (p, end), need in zip(models, rows, needs, strict=True):
            best = [int(i) for i in np.argsort(-p, kind="stable")[:top_k]]
            if end > p[best[-1]]:
                options.add(END)
                best = best[: top_k - 1]
            options |= {m.surfaces.of[i].decode()[len(need) :] for i in best if p[i] > 0} - {""}

        def mean(option, rows=rows, needs=needs):
            found = [
                end if option is END else p[m.first_piece(need + option)]
                for m, (p, end), need in zip(models, rows, needs, strict=True)
            ]
            return sum(found) / len(found)

        chosen = max(sorted(options, key=lambda o: (o is END, o or "")), key=mean)
        if chosen is END:
            break
        text += chosen
        scores.append(mean(chosen))
    return text, scores


def safe(models: list[Model], steps: int, top_k: int, threshold: float) -> tuple[str, list[float], int]:
    """The text, the probability of each of the main model's tokens in it, and at how many the mean was taken."""
    main, others = models[0], models[1:]
    maps = [build_vocabulary_map(main.tokenizer, m.tokenizer, method="prefix", cache=False).matrix for m in others]
    ids: list[int] = []
    scores: list[float] = []
    fused = 0
    for _ in range(steps):
        written = b"".join(main.surfaces.of[i] for i in ids).decode()
        text = written.removeprefix(main.lead)
        need = main.lead if not ids else ""
        p, end = main.expects(ids, need)
        draft = "" if end >= p.max() else main.surfaces.of[int(p.argmax())].decode()
        row = np.append(p, end)
        places = [len((m.lead + text).encode()) for m in others]
        at_boundary = [e in [0, *m.byte_ends(m.lead + text + draft)] for m, e in zip(others, places, strict=True)]
        if max(p.max(), end) < threshold and not need and all(at_boundary):
            fused += 1
            rows = [row]
            for m, matrix in zip(others, maps, strict=True):
                q, q_end = m.expects(m.tokens(m.lead + text))
                listed = np.zeros(len(q))
                best = np.argsort(-q, kind="stable")[:top_k]
                listed[best] = q[best]
                mapped = listed[: matrix.shape[0]] @ matrix.toarray()
                rest = 1 - q_end - mapped.sum()
                rows.append(np.append(mapped + rest * p, q_end + rest * end))
            row = np.mean(rows, axis=0)
        chosen = int(row.argmax())
        if chosen == len(p):
            break
        ids.append(chosen)
        if main.surfaces.of[chosen].decode() != need:
            scores.append(float(row[chosen]))
    return b"".join(main.surfaces.of[i] for i in ids).decode().removeprefix(main.lead), scores, fused


def cool(models: list[Model], segments: int, most: int) -> tuple[str, list[tuple[str, str, float]]]:
    """Mode ``shortest``: the text, and each segment with its writer and its mean perplexity."""
    text, found = "", []
    for _ in range(segments):
        drafts: dict[str, str] = {}
        own: dict[tuple[str, str], list[float]] = {}
        for m in models:
            before = m.tokens(m.lead + text) if text else []
            ids, segment = list(before), ""
            while True:
                need = m.lead if not ids else ""
                p, end = m.expects(ids, need)
                token = m.surfaces.of[int(p.argmax())].decode()
                if end >= p.max() or (segment.strip() and token[0].isspace()):
                    break
                ids.append(int(p.argmax()))
                segment += token[len(need) :]
                if len(ids) - len(before) >= most:
                    break
            drafts.setdefault(segment, m.name)
            own[m.name, segment] = nats(m, ids, len(before))

        def score(segment, text=text, own=own):
            values = []
            for m in models:
                ids = m.tokens(m.lead + text + segment) if text + segment else []
                known = own.get((m.name, segment))
                values.append(np.exp(np.mean(known or nats(m, ids, sum_tokens(m, text)))))
            return float(np.mean(values))

        best = min(drafts, key=score)
        if not best:
            break
        found.append((best, drafts[best], score(best)))
        text += best
    return text, found


def sum_tokens(m: Model, text: str) -> int:
    return len(m.tokens(m.lead + text)) if text else 0


def nats(m: Model, ids: list[int], first: int) -> list[float]:
    """Of the tokens from number ``first`` on; of the end of the turn where there are none."""
    rows = m.logprobs(ids)
    if len(ids) == first:
        return [-float(np.logaddexp.reduce(rows[-1][m.ends]))]
    return [-float(rows[i][ids[i]]) for i in range(first, len(ids))]
