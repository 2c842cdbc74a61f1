"""Train the demo models from scratch: a tokenizer, a pivot, and three fine-tunes of the pivot.

    python demo/build.py                      # everything, into demo/models
    python demo/build.py --only arithmetic    # one fine-tune again, from the pivot that is there

CPU only, one thread, seeded. The pivot reads the Python documentation and has met every skill; each fine-tune goes on
from the pivot with its own skill, and reads on in the documentation so as not to forget it.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import tasks
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODELS = Path(__file__).parent / "models"
VOCABULARY = 768
TOKENIZER_ROWS = 3000  # of each skill, beside the text
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# Words, single digits, runs of other signs, white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REPORT_EVERY = 100  # steps
STAGE_STRIDE = 7  # between the seeds of the pivot's stages, so that each reads rows of its own
IGNORED = -100  # label of a position that is not learned


@dataclass(frozen=True)
class Stage:
    """One training run. ``skills``: rows of each skill in a batch; ``text_rows``: blocks of text in a batch;
    ``long_skills``: those whose rows are a batch, with a loss, of their own, so that short rows need no padding."""

    steps: int
    learning_rate: float
    skills: dict[str, int]
    text_rows: int
    block: int = 128
    final_share: float = 0.05  # of the learning rate, at the last step
    long_skills: tuple[str, ...] = ()


# Stopped while the skills are half learned: what there is to fuse is what the fine-tunes learn on top. A model of this
# size learns such a skill in one jump, so another seed or another machine may stop on another side of some jump.
PIVOT = (
    Stage(700, 3e-3, {"add": 22, "reverse": 8, "sort": 6, "facts": 14, "pick": 3}, text_rows=8),
    Stage(200, 1.5e-3, {"add": 5, "reverse": 22, "sort": 8, "facts": 14, "pick": 3}, text_rows=6),
)
# A few rows of the other skills, and text, keep a fine-tune near the pivot, where weights can be averaged.
TARGETS = {
    "numbers": Stage(400, 5e-4, {"add": 36, "pick": 12, "reverse": 4, "sort": 4, "facts": 6}, text_rows=3),
    "strings": Stage(400, 5e-4, {"add": 4, "pick": 2, "reverse": 24, "sort": 24, "facts": 6}, text_rows=3),
    "facts": Stage(400, 5e-4, {"add": 4, "pick": 2, "reverse": 4, "sort": 4, "facts": 50}, text_rows=3),
}


def train_tokenizer(documents: list[str], rows: list[tasks.Row]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens with a chat template that marks what the assistant says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for row in rows for line in (row.prompt, row.answer)]
    tokenizer.train_from_iterator(documents + lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.3 million parameters with random weights."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=ids["<|eos|>"],
        pad_token_id=ids["<|pad|>"],
        attention_dropout=0.0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|bos|>"],
        eos_token_id=[ids["<|end|>"], ids["<|eos|>"]],
        pad_token_id=ids["<|pad|>"],
        do_sample=False,
        max_new_tokens=32,
    )
    return model


def chat_batch(tokenizer: PreTrainedTokenizerFast, rows: list[tasks.Row]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; only what the assistant says is learned. input_ids, labels: int64 [B, T]."""
    encoded = tokenizer.apply_chat_template(
        [row.messages() for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [torch.tensor(row) for row in encoded["input_ids"]]
    masks = [torch.tensor(row, dtype=torch.bool) for row in encoded["assistant_masks"]]
    labels = [row.masked_fill(~mask, IGNORED) for row, mask in zip(ids, masks, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def text_batches(stream: torch.Tensor, rows: int, block: int, seed: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of blocks cut out of the token stream at random places. input_ids, labels: int64 [rows, block]."""
    rng = random.Random(f"text {seed}")
    while True:
        starts = [rng.randrange(len(stream) - block) for _ in range(rows)]
        ids = torch.stack([stream[start : start + block] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to the stage's final rate."""
    warm_up = stage.steps / 20
    if step < warm_up:
        return stage.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1.0, stage.steps - warm_up)
    low = stage.final_share
    return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, stream: torch.Tensor, seed: str
) -> None:
    """Train in place. ``stream``: the text's tokens, int64 [tokens]. ``seed`` picks the rows and the blocks of text."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
    rows = {skill: tasks.training_rows(skill, seed) for skill in stage.skills}
    texts = text_batches(stream, stage.text_rows, stage.block, seed)
    model.train()
    started, tokens = time.monotonic(), 0
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        chosen = [next(rows[skill]) for skill, count in stage.skills.items() for _ in range(count)]
        short = [row for row in chosen if row.skill not in stage.long_skills]
        long = [row for row in chosen if row.skill in stage.long_skills]
        losses = []
        for batch in (*(chat_batch(tokenizer, group) for group in (short, long) if group), next(texts)):
            loss = model(**batch).loss
            loss.backward()
            losses.append(f"{loss.item():.2f}")
            tokens += batch["input_ids"].numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % REPORT_EVERY == 0:
            speed = tokens / (time.monotonic() - started)
            click.echo(
                f"  step {step + 1}/{stage.steps}: loss on skills and text {' '.join(losses)}; "
                f"{speed:.0f} tokens a second"
            )


def deterministic(threads: int) -> None:
    """The same bits on every run on one machine: fixed thread count, deterministic kernels."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> torch.Tensor:
    """All documents in a random order, each between bos and eos. int64 [tokens]."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    start = tokenizer.bos_token or ""
    encoded = tokenizer.backend_tokenizer.encode_batch(
        [f"{start}{text}{tokenizer.eos_token}" for text in order], add_special_tokens=False
    )
    return torch.tensor([token for encoding in encoded for token in encoding.ids])


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16, with the configuration. ``model`` itself is rounded too."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def build_pivot(documents: list[str], folder: Path, seed: int) -> None:
    """Train the tokenizer and the pivot."""
    rows = [row for skill in tasks.SKILLS for row in islice(tasks.training_rows(skill, seed + 1), TOKENIZER_ROWS)]
    tokenizer = train_tokenizer(documents, rows)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    stream = token_stream(tokenizer, documents, seed)
    for number, stage in enumerate(PIVOT):
        train(model, tokenizer, stage, stream, str(seed + STAGE_STRIDE * number))
    save(model, folder)
    tokenizer.save_pretrained(folder)


def build_target(name: str, documents: list[str], pivot: Path, folder: Path, seed: int) -> None:
    """Fine-tune the pivot on one target's skills."""
    tokenizer = AutoTokenizer.from_pretrained(pivot, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(pivot, dtype=torch.float32, local_files_only=True)
    # Every run has a seed of its own: fine-tunes read other rows and other blocks of text than the pivot did.
    train(model, tokenizer, TARGETS[name], token_stream(tokenizer, documents, seed), f"{name} {seed}")
    save(model, folder)
    for file in TOKENIZER_FILES:
        shutil.copyfile(pivot / file, folder / file)


@click.command(help=__doc__)
@click.option("--out", default=MODELS, show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(["pivot", *TARGETS]), help="Build only this; can be repeated.")
@click.option("--threads", default=1, show_default=True, help="More are faster and give other last bits.")
def main(out: Path, seed: int, only: tuple[str, ...], threads: int) -> None:
    deterministic(threads)
    documents = tasks.documents(held_out=False)
    started = time.monotonic()
    for name in only or ("pivot", *TARGETS):
        click.echo(f"{name}:")
        if name == "pivot":
            build_pivot(documents, out / name, seed)
        else:
            build_target(name, documents, out / "pivot", out / name, seed)
        click.echo(f"  done, {time.monotonic() - started:.0f} s since the start")


if __name__ == "__main__":
    main()
