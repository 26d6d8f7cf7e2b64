"""Text is never control: no string makes a special id, whatever the tokenizer; and the text comes back where it can."""

import json

import numpy as np
import pytest
import tokenizer_kinds as kinds
from hypothesis import example, given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.text.prepare import prepare
from calm.text.shards import open_data
from calm.text.tokenizer import FileTokenizer, load_tokenizer
from calm.text.tokenizer_spec import SPECIALS
from calm.text.tokenizer_training import train_words, word_tokenizer

EVERY = kinds.every_kind()
SPELT = [*SPECIALS, "</s>", "<s>", "[SEP]", "<unk>", "[UNK]", "<|user|>", "<|", "|>", "the", " ", "\n", "e", "\ud83d", "é"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(SPELT), max_size=12).map("".join), st.text("<|>/sendmask ", max_size=30))


def special_ids(tokenizer):
    """Ids that stand for no text: ours, and what the file marks as special but for its unknown token."""
    found = {tokenizer.begin_id, tokenizer.end_id, tokenizer.mask_id}
    if isinstance(tokenizer, FileTokenizer):
        added = json.loads(tokenizer.to_json())["added_tokens"]
        found |= {token["id"] for token in added if token["special"] and token["content"] not in ("<unk>", "[UNK]")}
    return sorted(found)


@pytest.mark.parametrize("kind", EVERY)
@given(text=TEXTS)
@example("the <|end|> river flows . <|begin|> and the <|mask|> sees it . </s> [SEP] <s>")
@example("<|end|>" * 3)
def test_no_text_makes_a_special_id(kind, text):
    tokenizer = EVERY[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all()
    assert not np.isin(ids, special_ids(tokenizer)).any()
    for row in tokenizer.encode_batch(["the", text]):
        assert not np.isin(row, special_ids(tokenizer)).any()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "tiktoken", "eager_bpe", "ordinary_added"])
def test_where_bytes_are_kept_control_words_come_back_as_text(kind):
    if kind not in EVERY:
        pytest.skip("tiktoken is missing")
    text = "the <|end|> river . <|begin|> and the <|mask|> "
    assert EVERY[kind].decode(EVERY[kind].encode(text)) == text


@pytest.mark.parametrize("kind", [kind for kind in EVERY if isinstance(EVERY[kind], FileTokenizer)])
def test_a_saved_tokenizer_still_keeps_text_and_control_apart(kind, tmp_path):
    EVERY[kind].save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == EVERY[kind].fingerprint
    text = "the <|end|> river </s> [SEP]"
    np.testing.assert_array_equal(again.encode(text), EVERY[kind].encode(text))


@pytest.mark.parametrize("build", [kinds.ordinary_added, kinds.control_words, kinds.unigram])
def test_marking_specials_leaves_the_fingerprint_and_the_ids_of_a_file_alone(build):
    """Prepared data holds such files: they must open, with the same special ids."""
    before = build()
    ids = {name: before.token_to_id(name) for name in SPECIALS}
    taken = FileTokenizer(build())
    for name, id in zip(SPECIALS, (taken.begin_id, taken.end_id, taken.mask_id), strict=True):
        assert ids[name] is None or ids[name] == id
    assert FileTokenizer(build()).fingerprint == taken.fingerprint


def test_words_that_read_as_specials_are_unknown_words_of_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("the <|end|> river flows . <|begin|> and the <|mask|> sees it .\n" * 300)
    manifest = prepare(tmp_path / "a.txt", tmp_path / "data", "words", valid=0.0, test=0.0, quiet=True)
    data = open_data(tmp_path / "data")
    split = data.split("train")
    ids, special = split.read(0, split.num_tokens), special_ids(data.tokenizer)
    assert np.flatnonzero(np.isin(ids, special)).tolist() == [split.num_tokens - 1] and ids[-1] == data.tokenizer.end_id
    assert manifest.splits["train"]["documents"] == 1
    assert data.tokenizer.decode(ids[:14]) == "the <unk> river flows . <unk> and the <unk> sees it .\nthe"
    aliases = train_words(["a <|begin_of_text|> <|end_of_text|>"])
    assert aliases.encode("<|begin_of_text|> a <|end_of_text|>").tolist() == [0, 2, 0]


def test_a_word_without_an_id_is_one_line():
    with pytest.raises(UsageError, match="cannot spell") as caught:
        word_tokenizer(["w0", "w1"]).encode("w0 river")
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_read_as_a_replacement_character():
    for kind in ("bytes", "bpe"):
        assert EVERY[kind].decode(EVERY[kind].encode("a\ud83d b")) == "a\ufffd b"
        assert EVERY[kind].decode(EVERY[kind].encode("\ud83d\ude00")) == "\U0001f600"


FILES = [tokenizer.to_json() for tokenizer in EVERY.values()]
VALUES = st.sampled_from([None, True, -1, 0, 2**31, 2**63, 1e300, "", "<|end|>", [], {}, ["a"], {"a": 1}])


@given(draw=st.data())
def test_any_other_tokenizer_file_is_refused_in_one_line_or_keeps_the_law(draw, tmp_path_factory):
    """One entry of a file changed or left out, or some of its bytes."""
    content = draw.draw(st.sampled_from(FILES))
    if draw.draw(st.booleans()):
        fields = table = json.loads(content)
        while True:
            key = draw.draw(st.sampled_from(sorted(table)) if isinstance(table, dict) else st.integers(0, len(table) - 1))
            if not isinstance(table[key], dict | list) or not table[key] or draw.draw(st.integers(0, 3)) == 0:
                break
            table = table[key]
        if draw.draw(st.booleans()):
            table[key] = draw.draw(VALUES)
        else:
            del table[key]
        changed = json.dumps(fields).encode()
    else:
        changed = bytearray(content.encode())
        for place in draw.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=3)):
            changed[place] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    path.write_bytes(changed)
    try:
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode("the <|end|> river é </s> 1\n")
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert not np.isin(ids, [tokenizer.begin_id, tokenizer.end_id, tokenizer.mask_id]).any()
    assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.fingerprint) == 16
