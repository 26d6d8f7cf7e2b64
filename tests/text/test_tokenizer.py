"""Every text comes back, no text makes a special id, a fingerprint tells vocabularies apart."""

import base64
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from calm.errors import MissingExtraError, UsageError
from calm.text.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer, require_same_tokenizer
from calm.text.tokenizer_file import byte_characters
from calm.text.tokenizer_spec import bpe_size
from calm.text.tokenizer_training import train_bpe

SAMPLE = ["the cat sat on the mat, the cat ate\n\nthe rat  and 1234 naïve cafés beside another longest sentence. " * 20]
BPE = train_bpe(SAMPLE, 310)


def rank_file(path):
    """A tiktoken rank file of the merges of BPE: what both formats can say."""
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary = json.loads(BPE.to_json())["model"]["vocab"]
    lines = [
        base64.b64encode(bytes(characters[c] for c in token)) + b" %d" % rank
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@given(st.text())
@example("<|end|><|begin|><|mask|>")
@example("\r\n \t\x00\u2028 \U0001f600 e\u0301\n\n  ")
def test_text_comes_back_and_holds_no_special_id(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert not np.isin(ids, [tokenizer.begin_id, tokenizer.end_id, tokenizer.mask_id]).any()
        assert (ids < tokenizer.vocab_size).all()


@given(st.lists(st.text(), max_size=4))
def test_a_batch_is_its_texts_one_by_one(texts):
    for row, text in zip(BPE.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(row, BPE.encode(text))


def test_decode_drops_specials_and_survives_half_a_character():
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode("naïve")
        mixed = np.concatenate([[tokenizer.begin_id], ids, [tokenizer.mask_id, tokenizer.end_id]])
        assert tokenizer.decode(mixed) == "naïve"
    assert ByteTokenizer().decode(np.array([0xC3])) == "\N{REPLACEMENT CHARACTER}"


def test_specials_are_the_last_ids_and_the_size_counts_them():
    assert BPE.vocab_size == 310
    assert (BPE.begin_id, BPE.end_id, BPE.mask_id) == (307, 308, 309)


def test_training_is_deterministic():
    assert train_bpe(SAMPLE, 310).to_json() == BPE.to_json()


def test_saved_and_loaded_is_the_same_tokenizer(tmp_path):
    for tokenizer in (ByteTokenizer(), BPE):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path)  # a folder will do
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.decode(again.encode("<|end|> cat")) == "<|end|> cat"


def test_bytes_mean_the_same_to_every_reader_of_their_file():
    text = "naïve <b>\n"
    inner = tokenizers.Tokenizer.from_str(ByteTokenizer().to_json())
    assert inner.encode(text).ids == ByteTokenizer().encode(text).tolist()


def test_llama_specials_are_taken_for_ours_and_only_the_rest_is_appended():
    inner = tokenizers.Tokenizer.from_str(BPE.to_json())
    plain = tokenizers.Tokenizer(inner.model)
    plain.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    taken = FileTokenizer(plain)
    assert [taken.begin_id, taken.end_id] == [plain.token_to_id("<|begin_of_text|>"), plain.token_to_id("<|end_of_text|>")]
    assert taken.mask_id == taken.vocab_size - 1 == taken.end_id + 1


def test_fingerprint_tells_vocabularies_apart_and_a_mismatch_is_refused():
    other = train_bpe(SAMPLE, 300)
    assert len({BPE.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3
    require_same_tokenizer(BPE.fingerprint, BPE.fingerprint, "run")
    with pytest.raises(UsageError, match="run: made with another tokenizer"):
        require_same_tokenizer(other.fingerprint, BPE.fingerprint, "run")


@pytest.mark.parametrize(("spec", "size"), [("bpe:8192", 8192), ("bpe:8k", 8000), ("bytes", None), ("a/b.json", None)])
def test_sizes_in_specs(spec, size):
    assert bpe_size(spec) == size


@pytest.mark.parametrize("spec", ["bpe:", "bpe:many", "bpe:258", "bpe:300", "nowhere/tokenizer.json"])
def test_a_spec_that_cannot_be_loaded_says_why_in_one_line(spec):
    with pytest.raises(UsageError, match=f"tokenizer {spec}: ") as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{}", b"{broken", b"hello world", b"\x0a\x0b\x00\x01", b"aGk= 0\n"])
def test_a_file_of_neither_format_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.model: "):
        load_tokenizer(path)


def test_rank_file_agrees_with_tiktoken_and_survives_saving(tmp_path):
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(rank_file(tmp_path / "llama.model"))
    text = "the cat's naïve <|end|> mat,\n\n  1234 \U0001f600"
    assert tokenizer.vocab_size == 310
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text.encode())  # merges are used
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_a_vocabulary_with_gaps_whose_words_would_be_special_is_refused(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "the": 2, "cat": 3}, unk_token="<unk>"))
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"tokenizer.json: 'cat' and '<\|begin\|>' share the id 3|'<\|begin\|>' and 'cat'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranks: ranks.pop(base64.b64encode(b"a").decode()), "1 are missing"),
        (lambda ranks: ranks.update({base64.b64encode(b"the cat").decode(): 5}), "different whole numbers"),
        (lambda ranks: ranks.update({"": 500}), "empty token"),
        (lambda ranks: ranks.update({base64.b64encode(b"the cat").decode(): -5}), "different whole numbers"),
        (lambda ranks: ranks.update({base64.b64encode(b"the cat").decode(): 2**40}), "different whole numbers"),
        (lambda ranks: ranks.update({base64.b64encode(b"the cat").decode(): None}), "different whole numbers"),
    ],
)
def test_ranks_that_cannot_spell_every_text_are_refused(tmp_path, change, message):
    pytest.importorskip("tiktoken")
    load_tokenizer(rank_file(tmp_path / "llama.model")).save(tmp_path / "tokenizer.json")
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    change(fields["ranks"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", ["x*", "(", "", 3])
def test_a_pattern_that_cannot_split_is_refused(tmp_path, pattern):
    pytest.importorskip("tiktoken")
    load_tokenizer(rank_file(tmp_path / "llama.model")).save(tmp_path / "tokenizer.json")
    fields = json.loads((tmp_path / "tokenizer.json").read_text()) | {"pattern": pattern}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match="tokenizer.json: "):
        load_tokenizer(tmp_path)


def test_ids_that_a_rank_file_leaves_out_have_no_text(tmp_path):
    pytest.importorskip("tiktoken")
    path = rank_file(tmp_path / "llama.model")
    path.write_bytes(path.read_bytes() + base64.b64encode(b"the cat sat on") + b" 400\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 404
    assert tokenizer.decode([350, 400, 351, tokenizer.end_id]) == "the cat sat on"


def test_rank_file_without_tiktoken_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(MissingExtraError, match=r"calm-lm\[tiktoken\]"):
        load_tokenizer(rank_file(tmp_path / "llama.model"))
