"""Cutting changes neither the text nor its tokens, and does not depend on how a file is read."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.text import document_pieces
from calm.text.document_pieces import cut_blocks, cut_text
from calm.text.tokenizer_training import train_bpe

LETTERS = st.text(alphabet="ab \n.", max_size=300)
LINES = st.lists(st.sampled_from(["the cat,", "sat  naïve", "", "the cat sat naïve the"]), max_size=40)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(document_pieces, "PIECE", 20)


def documents(stream):
    """The stream's documents, joined again."""
    found, parts = [], []
    for text, last, _ in stream:
        parts.append(text)
        if last:
            found.append("".join(parts))
            parts = []
    assert not parts, "the last document did not end"
    return found


@given(LETTERS)
def test_pieces_of_a_document_join_to_it_and_are_bounded(text):
    found = list(cut_text(text))
    assert "".join(piece.text for piece in found) == text
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece.text) <= 2 * document_pieces.PIECE for piece in found)
    assert all(len(piece.text) > document_pieces.PIECE for piece in found[:-1])


@given(LETTERS, st.lists(st.integers(1, 40), min_size=1), st.sampled_from([None, "\n\n", "b.", "a", "a\nb", "ab."]))
def test_blocks_do_not_show(text, sizes, separator):
    whole = list(cut_blocks([text], separator))
    blocks, start = [], 0
    for size in sizes * len(text):
        blocks.append(text[start : start + size])
        start += size
    assert documents(cut_blocks(blocks, separator)) == documents(whole)
    if separator is None:
        assert list(cut_blocks(blocks)) == whole
        assert "".join(piece.text for piece in whole) == text


def test_a_separator_that_is_still_being_read_is_not_cut():
    blocks = ["x" * (2 * document_pieces.PIECE - 1) + "ab", ".yy"]
    assert documents(cut_blocks(blocks, "ab.")) == [blocks[0][:-2], "yy"]


@given(LETTERS)
def test_a_separator_gives_its_documents_without_the_white_space_around(text):
    expected = [part.strip() for part in text.split("b.") if part.strip()]
    assert documents(cut_blocks([text], "b.")) == expected


BPE = train_bpe(["the cat, sat\n\nthe naïve  cat sat. " * 30], 300)


@given(LINES)
def test_tokens_of_the_pieces_are_the_tokens_of_the_whole(lines):
    """Wherever a line end between visible characters was found, as in prose it nearly always is."""
    text = "\n".join(lines)
    found = [piece.text for piece in cut_text(text)]
    clean = all(a[-1:] == "\n" and a[-2:-1].strip() and b[:1].strip() for a, b in itertools.pairwise(found))
    if clean:
        joined = np.concatenate([BPE.encode(part) for part in found])
        np.testing.assert_array_equal(joined, BPE.encode(text))


def test_prose_is_cut_cleanly():
    text = "the cat sat.\n\n the\n\nnaïve\nthe cat,\n" * 40
    found = [piece.text for piece in cut_text(text)]
    assert len(found) > 20 and all(part.endswith(("naïve\n", "cat,\n")) for part in found)
    np.testing.assert_array_equal(np.concatenate([BPE.encode(part) for part in found]), BPE.encode(text))


def test_text_without_a_line_end_is_cut_between_words_with_the_same_tokens():
    text = "the cat sat " * 40
    found = [piece.text for piece in cut_text(text)]
    assert all(part.startswith(" ") for part in found[1:])
    np.testing.assert_array_equal(np.concatenate([BPE.encode(part) for part in found]), BPE.encode(text))
