"""A continuation reads on from its prompt, and its pieces, joined, are its text: for any tokenizer and any ids."""

import numpy as np
import pytest
import tokenizer_kinds as kinds
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from calm.text import continuation
from calm.text.continuation import ContinuationText, continuation_text
from calm.text.tokenizer import FileTokenizer
from calm.text.tokenizer_training import train_words


def decoding(decoder):
    """A tokenizer whose decoder is another one."""
    inner = tokenizers.Tokenizer.from_str(kinds.llama().to_str())
    inner.decoder = decoder
    return FileTokenizer(inner)


EVERY = kinds.every_kind()
ODD = {
    "strip at the start": decoding(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("e", 3, 0)])),
    "replace across tokens": decoding(decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("the|h.*"), "e")])),
    "ctc": decoding(decoders.CTC(pad_token="<unk>", word_delimiter_token="▁")),
    "bytes after bytes": decoding(decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()])),
    "suffix inside": decoding(decoders.BPEDecoder(suffix="h")),
    "no decoder of any kind": decoding(decoders.Sequence([])),
}
ALL = EVERY | ODD
IDS = st.lists(st.integers(0, 10**6), max_size=12)


def pieces_of(tokenizer, prompt, chunks):
    text = ContinuationText(tokenizer, prompt)
    return [*(text.add(chunk) for chunk in chunks), text.finish()]


@pytest.mark.parametrize("kind", ALL)
@given(prompt=IDS, chunks=st.lists(IDS, max_size=6))
@example([0xE2], [[0x82], [0xAC, 0x41]])
@example([3 + 0xE2], [[3 + 0x82, 3 + 0xAC], [3 + 0xFF], [263]])
def test_pieces_joined_are_the_text(kind, prompt, chunks):
    tokenizer = ALL[kind]
    prompt, *chunks = ([id % tokenizer.vocab_size for id in row] for row in (prompt, *chunks))
    new = [id for chunk in chunks for id in chunk]
    whole, before = tokenizer.decode([*prompt, *new]), tokenizer.decode(prompt)
    text = continuation_text(tokenizer, prompt, new)
    assert "".join(pieces_of(tokenizer, prompt, chunks)) == text
    assert whole.endswith(text)
    if whole.startswith(before):
        assert before + text == whole
    else:
        kept = whole[: len(whole) - len(text)]
        assert before.startswith(kept) and before[len(kept) : len(kept) + 1] != text[:1]


@pytest.mark.parametrize("kind", ALL)
@given(text=st.text("the river|>é\n. ", max_size=40), chunk=st.integers(1, 3))
def test_a_window_shows_what_the_whole_shows(kind, text, chunk):
    tokenizer = ALL[kind]
    ids = tokenizer.encode("the" * (kind == "no decoder") or text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuation, "WINDOW", 5)
        patch.setattr(continuation, "CONTEXT", 3)
        found = pieces_of(tokenizer, ids[:2], [ids[start : start + chunk] for start in range(2, len(ids), chunk)])
    assert "".join(found) == continuation_text(tokenizer, ids[:2], ids[2:])


@pytest.mark.parametrize("kind", EVERY)
def test_text_is_shown_as_it_comes(kind):
    tokenizer = EVERY[kind]
    ids = np.ones(9, np.int32) if kind == "no decoder" else tokenizer.encode("the cat the river the cat")
    *pieces, rest = pieces_of(tokenizer, ids[:2], ids[2:, None])
    assert sum(map(bool, pieces)) >= (len(pieces) + 1) // 2 and len(rest) < 2, pieces


def test_a_blank_stands_between_a_prompt_and_what_follows():
    words = train_words(["the river sang .\nnow"])
    prompt, new = words.encode("the river"), words.encode("river .\nnow")
    assert words.decode(new) == "river .\nnow"
    assert continuation_text(words, prompt, new) == " river .\nnow"
    assert pieces_of(words, prompt, [new[:1], new[1:3], new[3:]]) == [" river", " .\n", "now", ""]
    for kind in ("wordpiece", "unigram", "llama", "suffix_bpe"):
        tokenizer = EVERY[kind]
        first = tokenizer.encode("the river")
        both = tokenizer.encode("the river the cat")
        np.testing.assert_array_equal(both[: len(first)], first)
        assert continuation_text(tokenizer, first, both[len(first) :]) == " the cat"


def test_half_a_character_waits_for_its_rest():
    tokenizer = EVERY["bytes"]
    assert pieces_of(tokenizer, list(b"na"), [[0xC3], [0xAF], list(b"ve")]) == ["", "ï", "ve", ""]
    assert pieces_of(tokenizer, [*b"na", 0xC3], [[0xAF], []]) == ["ï", "", ""]
    assert pieces_of(tokenizer, [], [[0xC3]]) == ["", "\ufffd"]


def test_a_long_stream_decodes_a_bounded_window(monkeypatch):
    tokenizer, longest = EVERY["bpe"], [0]
    decode = type(tokenizer).decode

    def counted(self, ids):
        longest[0] = max(longest[0], len(ids))
        return decode(self, ids)

    text = "the cat sat on naïve mats, " * 300
    ids = tokenizer.encode(text)
    monkeypatch.setattr(type(tokenizer), "decode", counted)
    assert "".join(pieces_of(tokenizer, [], [ids[start : start + 4] for start in range(0, len(ids), 4)])) == text
    assert len(ids) > 2000 and longest[0] < continuation.WINDOW + 20
