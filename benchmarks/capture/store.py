"""Bytes per position, error and speed of the top-k store against FuseChat's layout and DistillKit's compressor.

python -m benchmarks.capture.store --distillkit PATH/TO/DistillKit

DistillKit (https://github.com/arcee-ai/DistillKit) is measured from a checkout. FuseChat's layout is a table of
``datasets`` with a list of float16 logits and a list of int64 ids for every token, as its scripts write it; its bytes
are per token of the row. The store's bytes are all files of the store, prompts, keys and index included, per label.

The rows: ``zipf``, random logits over a vocabulary of 151,936, Zipf-like with noise, as a language model's; once with
ids in order of frequency, as tokenizers number them, and once with ids at random, the worst case. ``peaked``: the same
sharpened, position by position by another factor, so that most are certain and some are open; no trained model.
``demo``: the demo's models on held-out text and on answers to held-out questions, vocabulary 768.

Errors are of log-probabilities in nats; the KL divergences are of the entries and the tail where a contestant keeps it,
else (*) of the entries renormalised.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measure import RESULTS, median_ms, write
from fusekit.capturing.shards import Codec, shard_bytes
from fusekit.capturing.store import Store, StoreSpec
from fusekit.capturing.writer import StoreWriter
from fusekit.settings import DEFAULT_MAX_ERROR
from fusekit.types import CapturedRow, TokenizedRow, TopK

VOCABULARY = 151_936
LABELS, PROMPT = 384, 128
MASS = 0.99
MODELS = Path(__file__).parents[2] / "demo/models"


def zipf_logits(rng: np.random.Generator, n: int, sharpen: bool) -> np.ndarray:
    """float32 [n, V]: falling with the logarithm of the rank, with noise; ``sharpen``: by a factor per position."""
    logits = -np.log(np.arange(VOCABULARY) + 10.0, dtype=np.float32) + rng.normal(0, 2, (n, VOCABULARY)).astype(
        np.float32
    )
    return logits * np.exp(rng.normal(1.6, 0.6, (n, 1))).astype(np.float32) if sharpen else logits


def top(logits: np.ndarray, rng: np.random.Generator, k: int) -> tuple[np.ndarray, ...]:
    """The k most probable ids and their log-probabilities [n, k], a label drawn from each row and its own."""
    logprobs = logits.astype(np.float64)
    logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    ids = np.argpartition(-logprobs, k - 1, axis=1)[:, :k]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logprobs, ids, 1), axis=1), 1)
    labels = (np.cumsum(np.exp(logprobs), axis=1) < rng.random((len(ids), 1))).sum(axis=1).clip(max=logits.shape[1] - 1)
    return ids, np.take_along_axis(logprobs, ids, 1), labels, np.take_along_axis(logprobs, labels[:, None], 1)[:, 0]


def captured(number: int, prompt: np.ndarray, columns: tuple[np.ndarray, ...], rng: np.random.Generator) -> CapturedRow:
    """A row of one question and one answer, the answer of labels."""
    ids, logprobs, labels, actual = columns
    T = len(prompt) + len(labels)
    is_label = np.arange(T) >= len(prompt)
    message, part = is_label.astype(np.int64), np.ones(T, np.int64)
    part[:3], part[-1] = 0, 2
    steps = rng.integers(1, 9, T) * (part == 1)
    ends = np.cumsum(steps)
    ends -= np.where(is_label, ends[len(prompt) - 1], 0)
    tokens = TokenizedRow(f"{number:032x}", np.r_[prompt, labels], message, part, ends, ends, is_label)
    tail = 1 - np.exp(logprobs).sum(axis=1)
    return CapturedRow(tokens, "chat", TopK(ids, logprobs, tail.clip(min=0)), actual, -float(actual.sum()))


def synthetic(count: int, k: int, ordered: bool, sharpen: bool) -> list[CapturedRow]:
    """Rows of ``zipf_logits``."""
    rng = np.random.default_rng(0)
    names = np.arange(VOCABULARY) if ordered else rng.permutation(VOCABULARY)
    rows = []
    for number in range(count):
        parts = [top(zipf_logits(rng, 64, sharpen), rng, k) for _ in range(LABELS // 64)]
        ids, logprobs, labels, actual = (np.concatenate(column) for column in zip(*parts, strict=True))
        prompt = rng.zipf(1.3, PROMPT) % VOCABULARY
        rows.append(captured(number, names[prompt], (names[ids], logprobs, names[labels], actual), rng))
    return rows


def demo(name: str, what: str, k: int) -> list[CapturedRow]:
    """A demo model's rows on held-out ``text``, the last three quarters labels, or on ``answers`` to held-out questions
    of its own skill."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(MODELS.parent))
    import tasks

    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    pairs: list[tuple[list[int], int]] = []
    if what == "text":
        for document in tasks.documents(held_out=True)[:24]:
            ids = tokenizer(document[:1500], add_special_tokens=False)["input_ids"][:500]
            pairs.append((ids, len(ids) // 4))
    else:
        for question in tasks.held_out_rows(name, 200):
            chat = tokenizer.apply_chat_template(question.messages(), tokenize=False)
            start = chat.rindex(question.answer)
            before = tokenizer(chat[:start], add_special_tokens=False)["input_ids"]
            pairs.append((before + tokenizer(chat[start:], add_special_tokens=False)["input_ids"], len(before)))
    rows = []
    rng = np.random.default_rng(0)
    for number, (ids, start) in enumerate(pairs):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().numpy()
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        order = np.argsort(-logprobs, axis=1)[:, :k]
        labels = np.array(ids)[start:]
        columns = (order, np.take_along_axis(logprobs, order, 1), labels, logprobs[np.arange(len(labels)), labels])
        rows.append(captured(number, np.array(ids[:start]), columns, rng))
    return rows


def narrowed(rows: list[CapturedRow], k: int) -> list[CapturedRow]:
    """The first k entries only."""
    out = []
    for row in rows:
        logprobs = row.rows.logprobs[:, :k]
        kept = TopK(row.rows.ids[:, :k], logprobs, (1 - np.exp(logprobs).sum(axis=1)).clip(min=0))
        out.append(dataclasses.replace(row, rows=kept))
    return out


def ragged(rows: list[CapturedRow]) -> list[CapturedRow]:
    """Entries until they hold ``MASS``."""
    out = []
    for row in rows:
        mass = np.exp(row.rows.logprobs)
        used = np.cumsum(mass, axis=1) - mass < MASS
        tail = (1 - np.where(used, mass, 0).sum(axis=1)).clip(min=0)
        kept = TopK(np.where(used, row.rows.ids, -1), np.where(used, row.rows.logprobs, -np.inf), tail)
        out.append(dataclasses.replace(row, rows=kept))
    return out


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row of log-probabilities."""
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0).sum(axis=1)


def errors(given: np.ndarray, found: np.ndarray, tails: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Any]:
    """Columns of the table for log-probabilities [n, k] given and found."""
    used = given > -np.inf
    off = np.abs(given[used] - found[used])
    if tails is not None:
        with np.errstate(divide="ignore"):
            p, q = (np.c_[values, np.log(tail)] for values, tail in zip((given, found), tails, strict=True))
    else:
        p, q = (values - np.logaddexp.reduce(values, axis=1, keepdims=True) for values in (given, found))
    kl = divergence(p, q)
    star = "" if tails is not None else "*"
    return {
        "max_error": round(float(off.max()), 4),
        "mean_error": round(float(off.mean()), 4),
        "mean_kl": f"{kl.mean():.2e}{star}",
        "max_kl": f"{kl.max():.2e}{star}",
    }


def rate(call: Callable[[], Any], positions: int) -> int:
    """Positions per second, of the median run."""
    return round(positions / median_ms(call, runs=9, seconds=2) * 1e3)


def stored(
    folder: Path, rows: list[CapturedRow], vocabulary: int, k: int, max_error: float = DEFAULT_MAX_ERROR
) -> Store:
    """A store of rows as they are, whole."""
    spec = StoreSpec(model="benchmark", vocabulary=vocabulary, top_k=k, max_error=max_error)
    writer = StoreWriter(folder, spec, [row.tokens.key for row in rows])
    for plan in writer.missing_shards():
        writer.write_shard(plan, rows[plan.start : plan.stop])
    writer.finish()
    return Store.open(folder)


def fusekit_store(rows: list[CapturedRow], vocabulary: int, k: int, max_error: float) -> dict[str, Any]:
    """Write a store, read it, compare."""
    positions = sum(len(row.actual) for row in rows)
    codec = Codec(vocabulary, k, max_error)
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder), rows, vocabulary, k, max_error)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        given, found, tails = [], [], []
        for row, back in zip(rows, store, strict=True):
            given.append(_wide(by_id(row.rows.ids, row.rows.logprobs), k))
            found.append(_wide(by_id(back.rows.ids, back.rows.logprobs), k))
            tails.append((row.rows.tail, back.rows.tail))
        decode = rate(lambda: sum(len(row.actual) for row in store), positions)
        random = rate(lambda: [one_alone(store, key) for key in shuffled(store.keys)], positions)
    encode = rate(lambda: shard_bytes([codec.encode(row) for row in rows], codec.exact), positions)
    both = tuple(np.concatenate(column) for column in zip(*tails, strict=True))
    return {
        "contestant": f"fusekit, bound {max_error}" if max_error else "fusekit, exact (float32)",
        "bytes_per_position": round(size / positions, 2),
        **errors(np.concatenate(given), np.concatenate(found), both),
        "encode_positions_per_s": encode,
        "decode_positions_per_s": decode,
        "random_positions_per_s": random,
    }


def one_alone(store: Store, key: str) -> CapturedRow:
    """An example of which nothing is decoded yet: what each costs in a store that is larger than its cache."""
    store._groups.clear()
    store._cached = 0
    return store.get(key)


def shuffled(things: Sequence[Any]) -> list[Any]:
    """The same in a random order."""
    return [things[at] for at in np.random.default_rng(0).permutation(len(things))]


def by_id(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities by rising id, -inf where there is no entry."""
    order = np.argsort(np.where(ids < 0, np.iinfo(np.int64).max, ids), axis=1, kind="stable")
    return np.take_along_axis(np.where(ids < 0, -np.inf, logprobs), order, 1)


def _wide(values: np.ndarray, k: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, k - values.shape[1])), constant_values=-np.inf)


def fusechat(rows: list[CapturedRow]) -> dict[str, Any]:
    """``datasets`` rows with a float16 logit and an int64 id per entry, for every token."""
    import datasets
    import torch

    datasets.disable_progress_bars()
    tokens = [row.tokens.ids.tolist() for row in rows]
    T = len(tokens[0])
    table = datasets.Dataset.from_dict(
        {
            "input_ids": tokens,
            "attention_mask": [[1] * T for _ in rows],
            "labels": [np.where(row.tokens.labels, row.tokens.ids, -100).tolist() for row in rows],
        }
    )

    def per_token(column: np.ndarray) -> np.ndarray:
        """A row for every token, those of the prompt like the first labels'."""
        return np.concatenate([column[: T - len(column)], column])

    # Logits are log-probabilities plus a number that the model does not fix; 20 is usual for the largest.
    logits = [per_token(row.rows.logprobs - row.rows.logprobs[:, :1] + 20) for row in rows]
    ids = [per_token(row.rows.ids) for row in rows]

    def add(_: Any, indices: list[int]) -> dict[str, Any]:
        return {
            "per_step_logits": torch.tensor(np.stack([logits[i] for i in indices])).half(),
            "per_step_indices": torch.tensor(np.stack([ids[i] for i in indices])),
            "metric_ce": torch.tensor([rows[i].token_ce for i in indices]).half(),
        }

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        made = table.map(add, batched=True, with_indices=True, batch_size=8, load_from_cache_file=False)
        made.save_to_disk(folder)
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        back = datasets.load_from_disk(folder)
        decode = rate(
            lambda: [(np.array(r["per_step_logits"]), np.array(r["per_step_indices"])) for r in back], len(rows) * T
        )
        order = shuffled(range(len(back)))
        random = rate(
            lambda: [
                (np.array(r["per_step_logits"]), np.array(r["per_step_indices"])) for r in (back[i] for i in order)
            ],
            len(rows) * T,
        )
        found = np.concatenate([np.array(row["per_step_logits"], np.float64) for row in back])
    given = np.concatenate(logits)
    given -= np.logaddexp.reduce(given, axis=1, keepdims=True)
    found -= np.logaddexp.reduce(found, axis=1, keepdims=True)
    return {
        "contestant": "FuseChat's layout",
        "bytes_per_position": round(size / (len(rows) * T), 2),
        **errors(given, found, None),
        "encode_positions_per_s": round(len(rows) * T / seconds),
        "decode_positions_per_s": decode,
        "random_positions_per_s": random,
        "note": "errors after renormalising the entries; no tail; whole Arrow files over all tokens",
    }


def distillkit(rows: list[CapturedRow], vocabulary: int, k: int) -> dict[str, Any]:
    """The configuration that its README calls the budget pick, for this k."""
    import torch
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    config = DistributionQuantizationConfig(
        d=vocabulary,
        k=k,
        exact_k=1,
        exact_dtype="bfloat16",
        polynomial_terms=[0, 1, "sqrt"],
        term_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
        error_diffusion=False,
    )
    compressor = LogprobCompressor(config)
    pairs = [(torch.tensor(r.rows.ids)[None], torch.tensor(r.rows.logprobs, dtype=torch.float32)[None]) for r in rows]
    packed = [compressor.compress_from_sparse(*pair) for pair in pairs]
    positions = sum(len(row.actual) for row in rows)
    found = [compressor.decompress_to_sparse(row) for row in packed]
    assert all(torch.equal(ids[0].long(), pair[0][0]) for (ids, _), pair in zip(found, pairs, strict=True))
    given = np.concatenate([row.rows.logprobs for row in rows])
    return {
        "contestant": "DistillKit, budget pick" + ("" if k == 50 else f" with k {k}"),
        "bytes_per_position": round(sum(t.nbytes for row in packed for t in row.values()) / positions, 2),
        **errors(given, np.concatenate([values[0].double().numpy() for _, values in found]), None),
        "encode_positions_per_s": rate(lambda: [compressor.compress_from_sparse(*pair) for pair in pairs], positions),
        "decode_positions_per_s": rate(lambda: [compressor.decompress_to_sparse(row) for row in packed], positions),
        "note": "compressed tensors alone: no tail, label, token or key",
    }


@click.command()
@click.option("--distillkit", "checkout", type=click.Path(exists=True, file_okay=False), help="A checkout of it.")
@click.option("--rows", "count", default=12, help="Synthetic rows of 384 labels.")
def main(checkout: str | None, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    if checkout:
        sys.path.insert(0, checkout)
    results: list[dict[str, Any]] = []

    def add(what: str, vocabulary: int, k: int, rows: list[CapturedRow], result: dict[str, Any]) -> None:
        entries = np.mean(np.concatenate([(row.rows.ids >= 0).sum(axis=1) for row in rows]))
        nats = sum(row.cross_entropy for row in rows) / sum(len(row.actual) for row in rows)
        head = {
            "rows": what,
            "nats_per_label": round(nats, 2),
            "vocabulary": vocabulary,
            "k": k,
            "mean_entries": round(float(entries), 2),
        }
        results.append({**head, "note": "", **result})
        print(results[-1], flush=True)

    for ordered in (False, True):
        wide = synthetic(count, 50, ordered, sharpen=False)
        what = f"zipf, ids {'by frequency' if ordered else 'at random'}"
        for k in (50, 10):
            rows = narrowed(wide, k)
            for max_error in (0.2, 0.02, 0.0):
                add(what, VOCABULARY, k, rows, fusekit_store(rows, VOCABULARY, k, max_error))
            if not ordered:
                add(what, VOCABULARY, k, rows, fusechat(rows))
                if checkout:
                    add(what, VOCABULARY, k, rows, distillkit(rows, VOCABULARY, k))
    peaked = synthetic(count, 50, ordered=False, sharpen=True)
    for k in (50, 10):
        for what, rows in (("full", narrowed(peaked, k)), (f"ragged {MASS}", ragged(narrowed(peaked, k)))):
            add(f"peaked, ids at random, {what}", VOCABULARY, k, rows, fusekit_store(rows, VOCABULARY, k, 0.2))
    for name, text in (("pivot", "text"), ("facts", "answers")):
        wide = demo(name, text, 50)
        for k in (50, 10):
            for what, rows in (("full", narrowed(wide, k)), (f"ragged {MASS}", ragged(narrowed(wide, k)))):
                add(f"demo {name}, {text}, {what}", 768, k, rows, fusekit_store(rows, 768, k, 0.2))
    write(RESULTS / "store.csv", results)


if __name__ == "__main__":
    main()
