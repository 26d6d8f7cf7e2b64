"""Word level: WikiText's rule, the same to both engines; what comes back; what is unknown; what a word count divides by."""

import re
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text.prepare import prepare
from calm.text.shards import open_data
from calm.text.summary import show_summary, summarize
from calm.text.tokenizer import ByteTokenizer, load_tokenizer
from calm.text.tokenizer_spec import words_size
from calm.text.tokenizer_training import train_bpe, train_words
from calm.text.words import LINE_END, UNKNOWN, count_words, plain_blanks, vocabulary, words_of

LINES = " \n = Title = \n \n The cat <unk> a cat , and the \xa0 dog \n"
WORDS = train_words([LINES])


def test_the_rule_is_wikitexts_a_line_split_at_white_space_and_closed():
    by_lines = [[*line.split(), LINE_END] for line in LINES.split("\n")[:-1]]
    assert words_of(LINES) == [word for line in by_lines for word in line]
    assert count_words(LINES) == len(LINES.split()) + LINES.count("\n") == len(WORDS.encode(LINES))


@given(st.text())
@example("a\x1cb \x85 c\u2028d\u3000e\ufefff\n\n")
@example("##a <unk> <eos> x<unk>\r\n\t b")
def test_words_come_back_with_plain_blanks(text):
    tokenizer = train_words([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == plain_blanks(text)
    assert len(ids) == count_words(text)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    assert text.isspace() or UNKNOWN in text or not (ids == tokenizer.unknown_id).any()


def test_both_engines_of_regular_expressions_mean_the_same_white_space():
    every = "".join(chr(point) + "x" for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)
    inner = tokenizers.Tokenizer.from_str(WORDS.to_json())
    assert inner.pre_tokenizer is not None
    assert [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(every)] == words_of(every)
    assert "\n".join(every.replace("\n", " ").split()) == "\n".join(re.findall(r"\S+", every))


def test_the_vocabulary_holds_every_word_and_the_two_that_are_no_words():
    assert vocabulary([LINES]) == [UNKNOWN, LINE_END, "=", "cat", ",", "The", "Title", "a", "and", "dog", "the"]
    assert WORDS.vocab_size == 11 + 3 and (WORDS.begin_id, WORDS.end_id, WORDS.mask_id) == (11, 12, 13)
    assert (WORDS.level, WORDS.unknown_id) == ("word", 0)
    assert (ByteTokenizer().level, train_bpe(["a b"], 260).level) == ("byte", "subword")
    assert train_words(["a b\n", "b <unk>"]).to_json() == train_words(["a b", "\nb "]).to_json()


def test_words_beyond_the_size_or_the_training_text_are_unknown():
    few = train_words(["b b b a a c\n"], 2 + 2 + 3)
    assert few.vocab_size == 7
    assert few.encode("a b c d <unk>").tolist() == [3, 2, 0, 0, 0]
    assert few.decode(few.encode(" c  a\n\nb \n")) == "<unk> a\n\nb\n"


def test_it_is_saved_for_every_reader_and_is_no_special_of_ours(tmp_path):
    WORDS.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.level, again.unknown_id) == (WORDS.fingerprint, "word", 0)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.decode(inner.encode(LINES).ids) == plain_blanks(LINES)
    assert again.encode("<|end|> <eos>").tolist() == [0, 0]
    assert again.fingerprint != train_words([LINES], 13).fingerprint


@pytest.mark.parametrize(("spec", "size"), [("words:10k", 10_000), ("words:8_192", 8192), ("words", None), ("bpe:300", None)])
def test_sizes_of_word_specs(spec, size):
    assert words_size(spec) == size


@pytest.mark.parametrize("spec", ["words:", "words:all", "words:5", "word", "words", "words:100"])
def test_a_word_spec_that_cannot_be_loaded_says_why_in_one_line(spec):
    with pytest.raises(UsageError, match=f"tokenizer {spec}: ") as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)


def test_prepared_words_are_those_of_the_train_split_alone(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("the cat sat\nthe cat\n" * 3000)
    (tmp_path / "text" / "valid.txt").write_text("the dog sat\n")
    manifest = prepare(tmp_path / "text", tmp_path / "all", "words", quiet=True)
    assert manifest.tokenizer["vocab_size"] == 5 + 3
    assert manifest.splits["train"]["tokens"] == 7 * 3000 + 1
    data = open_data(tmp_path / "all")
    split = data.split("valid")
    assert data.tokenizer.decode(split.read(0, split.num_tokens)) == "the <unk> sat\n"
    found = summarize(tmp_path / "all")
    assert (found["splits"]["train"]["unknown"], found["splits"]["valid"]["unknown"]) == (0.0, 1 / 5)
    assert "20.00%" in show_summary(found)
    few = prepare(tmp_path / "text", tmp_path / "few", "words:7", quiet=True)
    assert few.tokenizer["vocab_size"] == 7
    assert summarize(tmp_path / "few")["splits"]["train"]["unknown"] == pytest.approx(3000 / 21001)  # sat
    again = prepare(tmp_path / "text", tmp_path / "few", "words:7", quiet=True)
    assert again == few
    bytes_alone = prepare(tmp_path / "text", tmp_path / "bytes", "bytes", quiet=True)
    assert bytes_alone.splits["valid"]["tokens"] == 13
    assert "unknown words" not in show_summary(summarize(tmp_path / "bytes"))
