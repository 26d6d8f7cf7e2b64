"""Facts about a tokenizer.json, read from its content: whether it loses anything, and how its decoder treats the end of a text.

Decoders of the tokenizers library work on a list of token strings, one after the other. Until a step joins the list (`Fuse`,
`ByteLevel`), every step works on each token by itself, so that a token's text does not depend on those that follow. The
exceptions are listed in `Tail`.
"""

import functools
from typing import Any, NamedTuple

WORD_LINES = " ?\n ?"
"""pattern by which a word-level decoder removes the blanks around line ends (`calm.text.words`)"""

_EACH_TOKEN = {"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"}
_JOINS = {"ByteLevel", "Fuse"}


class Tail(NamedTuple):
    """Parts at the end of a decoded text that may change."""

    bounded: bool = True
    """False: any part may change, as far as is known"""
    byte_runs: bool = False
    """single bytes (`<0xE2>`) are decoded together with those beside them, all of them or none"""
    last_differs: bool = False
    """the last token is written otherwise than a token in the middle"""
    loose: str = ""
    """characters that may vanish from the end"""


def decoded_tail(decoder: dict[str, Any] | None) -> Tail:
    """The `Tail` of the entry "decoder" in a tokenizer.json; None joins tokens by blanks."""
    steps, joined, tail = _flat(decoder), False, Tail()
    for step in steps:
        kind = step["type"]
        if joined:
            if kind == "Replace" and step["pattern"] == {"Regex": WORD_LINES} and step["content"] == "\n":
                tail = tail._replace(loose=" ")
            elif kind != "Fuse" and not (kind == "Strip" and step["stop"] == 0):
                return Tail(bounded=False)
        elif kind in _JOINS:
            joined = True
        elif kind not in _EACH_TOKEN:
            return Tail(bounded=False)
        else:
            tail = tail._replace(
                byte_runs=tail.byte_runs or kind == "ByteFallback", last_differs=tail.last_differs or kind == "BPEDecoder"
            )
    return tail


def is_byte_token(token: str) -> bool:
    """Whether a token stands for one byte, as `<0xE2>` does."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def num_common(first: str, second: str) -> int:
    """Number of leading characters that two texts share."""
    shorter, longer = sorted((first, second), key=len)
    if longer.startswith(shorter):
        return len(shorter)
    return next(place for place, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b)


def keeps_bytes(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a byte-level BPE that loses nothing: all bytes, no normalizer, no blank added."""
    model, before, decoder = content["model"], content.get("pre_tokenizer") or {}, content.get("decoder") or {}
    steps = before.get("pretokenizers", [before])
    kept = all(
        (step.get("type") == "ByteLevel" and not step["add_prefix_space"])
        or (step.get("type") == "Split" and step["behavior"] != "Removed")
        or step.get("type") == "Digits"
        for step in steps
    )
    return (
        kept
        and any(step["type"] == "ByteLevel" for step in steps)
        and decoder.get("type") == "ByteLevel"
        and model["type"] == "BPE"
        and content.get("normalizer") is None
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and all(character in model["vocab"] for character in byte_characters())
        and not any(token["lstrip"] or token["rstrip"] for token in content["added_tokens"])
    )


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for each in decoder["decoders"] for step in _flat(each)]
    return [decoder]
