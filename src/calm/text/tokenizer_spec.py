"""Specs of tokenizers, as the user writes them: `bytes`, `bpe:SIZE`, `words`, `words:SIZE` or a path."""

from pathlib import Path

from calm.errors import UsageError

SPECIALS = ("<|begin|>", "<|end|>", "<|mask|>")
"""special tokens of every tokenizer"""
WORDS = "words"
KINDS = "bytes, bpe:SIZE, words, words:SIZE, a tokenizer.json or a tiktoken rank file"


def tokenizer_path(spec: str | Path) -> Path:
    """File that a spec names: "~" is the home folder, and a folder stands for the tokenizer.json in it."""
    path = Path(spec).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def is_trained(spec: str | Path) -> bool:
    """Whether a spec names a tokenizer that is made from a corpus: "bpe:SIZE", "words" or "words:SIZE"."""
    return bpe_size(spec) is not None or str(spec) == WORDS or words_size(spec) is not None


def bpe_size(spec: str | Path) -> int | None:
    """Size in a spec: "bpe:8192" -> 8192; None for any other spec. Raises UsageError: a size out of range."""
    return _size_in(spec, "bpe:", 256 + len(SPECIALS), 1 << 20, "256 bytes and 3 specials")


def words_size(spec: str | Path) -> int | None:
    """Size in a spec: "words:10k" -> 10000; None for any other spec, "words" (all of them) included.

    Raises UsageError: a size out of range.
    """
    return _size_in(spec, f"{WORDS}:", 3 + len(SPECIALS), 1 << 24, "<unk>, the line end, a word and 3 specials")


def _size_in(spec: str | Path, prefix: str, least: int, most: int, why: str) -> int | None:
    if not str(spec).startswith(prefix):
        return None
    digits = str(spec)[len(prefix) :].lower().replace("_", "")
    scale = 1000 if digits.endswith("k") else 1
    if not digits.removesuffix("k").isdigit():
        raise UsageError(f"tokenizer {spec}: the size must be a whole number, as in {prefix}8192")
    size = int(digits.removesuffix("k")) * scale
    if size < least:
        raise UsageError(f"tokenizer {spec}: the size must be at least {least} ({why})")
    if size > most:
        raise UsageError(f"tokenizer {spec}: the size must be at most {most:,}")
    return size
