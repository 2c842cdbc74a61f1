"""Train the sources of the demo from scratch: other architectures, other classes of tokenizer, other chat templates.

    python demo/sources.py                    # all, into demo/sources
    python demo/sources.py --only neox        # one of them

As ``build.py``: CPU only, one thread, seeded. Each source reads the same text as the pivot and learns skills of its
own from endless fresh rows with right labels. The other skills it has never met.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import tasks
import torch
from build import Stage, deterministic, save, token_stream, train
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SOURCES = Path(__file__).parent / "sources"
TOKENIZER_ROWS = 2000  # of each skill, beside the text
LONGEST_TEXT = 512  # tokens
HEADER = "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    f"{HEADER}{{% generation %}}{{{{ message['content'] }}}}<|eot_id|>{{% endgeneration %}}"
    f"{{% else %}}{HEADER}{{{{ message['content'] }}}}<|eot_id|>{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Vicuna writes it: no special tokens but bos and eos, and the space before a reply is the template's.
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "ASSISTANT:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _byte_level(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words, runs of ``digits`` digits, runs of other signs, white space; then bytes."""
    split = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_byte_level(tokenizer: Tokenizer, lines: list[str], vocabulary: int, special: list[str]) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def llama_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens as Llama 3's: up to three digits are one token."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|pad|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _byte_level(digits="{1,3}")
    return PreTrainedTokenizerFast(
        tokenizer_object=_train_byte_level(tokenizer, lines, 1024, special),
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        extra_special_tokens=special[3:],
        chat_template=LLAMA_TEMPLATE,
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def qwen_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,280 tokens that reads the text's NFKC form, single digits, no bos, ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = _byte_level(digits="")
    return PreTrainedTokenizerFast(
        tokenizer_object=_train_byte_level(tokenizer, lines, 1280, special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML_TEMPLATE,
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def neox_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE of 1,152 tokens: ``▁`` for spaces, single digits, bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # Rare characters are left to the bytes, as SentencePiece's character coverage does.
    trainer = trainers.BpeTrainer(
        vocab_size=1152 - len(byte_tokens), special_tokens=special, limit_alphabet=110, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    # The trainer knows no byte tokens: they go between the special tokens and the learned pieces.
    state = json.loads(tokenizer.to_str())
    learned = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)[len(special) :]
    state["model"]["vocab"] = {token: id_ for id_, token in enumerate([*special, *byte_tokens, *learned])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[3],
        chat_template=VICUNA_TEMPLATE,
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _llama(**common: object) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_key_value_heads=2, tie_word_embeddings=True, **common
    )
    return LlamaForCausalLM(config)


def _qwen(**common: object) -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=128, intermediate_size=448, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, **common
    )
    return Qwen3ForCausalLM(config)


def _neox(**common: object) -> PreTrainedModel:
    config = GPTNeoXConfig(hidden_size=128, intermediate_size=512, tie_word_embeddings=False, **common)
    return GPTNeoXForCausalLM(config)


@dataclass(frozen=True)
class Source:
    """One source: its tokenizer, its network, and what it is trained on."""

    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]
    network: Callable[..., PreTrainedModel]
    stage: Stage


SOURCE_MODELS = {
    "llama": Source(llama_tokenizer, _llama, Stage(900, 2.5e-3, {"weather": 32, "facts": 24}, text_rows=2)),
    "neox": Source(neox_tokenizer, _neox, Stage(1000, 2.5e-3, {"draw": 20, "add": 20, "pick": 10}, text_rows=2)),
    "qwen": Source(
        qwen_tokenizer,
        _qwen,
        Stage(650, 3e-3, {"code": 18, "reverse": 24}, text_rows=1, long_skills=("code",)),
    ),
}


def tokenizer_lines(documents: list[str], seed: int) -> list[str]:
    """What a source's tokenizer is trained on: the text, and rows of every skill."""
    rows = [row for skill in tasks.ALL_SKILLS for row in islice(tasks.training_rows(skill, seed + 1), TOKENIZER_ROWS)]
    roles = ["system", "user", "assistant", "USER:", "ASSISTANT:"] * TOKENIZER_ROWS  # one token each, as templates want
    return documents + [line for row in rows for line in (row.prompt, row.answer)] + roles


def new_source(source: Source, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A network with random weights for the tokenizer."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = source.network(
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LONGEST_TEXT,
        attention_dropout=0.0,
        **ids,
    )
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>") if "<|eot_id|>" in tokenizer.get_vocab() else None
    ends = [id_ for id_ in (end_of_turn, tokenizer.eos_token_id) if id_ is not None]
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": ends}, do_sample=False, max_new_tokens=32)
    return model


def build_source(name: str, documents: list[str], folder: Path, seed: int) -> None:
    """Train one source's tokenizer and weights."""
    source = SOURCE_MODELS[name]
    tokenizer = source.tokenizer(tokenizer_lines(documents, seed))
    torch.manual_seed(seed)
    model = new_source(source, tokenizer)
    size: PretrainedConfig = model.config
    click.echo(f"  {model.num_parameters():,} parameters, {size.vocab_size} tokens")
    train(model, tokenizer, source.stage, token_stream(tokenizer, documents, seed), f"{name} {seed}")
    save(model, folder)
    tokenizer.save_pretrained(folder)


@click.command(help=__doc__)
@click.option("--out", default=SOURCES, show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(SOURCE_MODELS)), help="Build only this; can be repeated.")
@click.option("--threads", default=1, show_default=True, help="More are faster and give other last bits.")
def main(out: Path, seed: int, only: tuple[str, ...], threads: int) -> None:
    deterministic(threads)
    documents = tasks.documents(held_out=False)
    started = time.monotonic()
    for name in only or tuple(SOURCE_MODELS):
        click.echo(f"{name}:")
        build_source(name, documents, out / name, seed)
        click.echo(f"  done, {time.monotonic() - started:.0f} s since the start")


if __name__ == "__main__":
    main()
