"""A world as a corpus: its ids are the tokenizer's, its splits are different text, its name says all that it depends on."""

import numpy as np
import pytest

from calm.errors import UsageError
from calm.text.prepare import prepare
from calm.text.shards import open_data
from calm.worlds.registry import build_world

SPEC = "world:markov:words=9,document=30,seed=3,tokens=20k"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    prepare(SPEC, folder, quiet=True)
    return open_data(folder)


def test_one_word_is_one_token_with_the_ids_of_the_world(data):
    world, tokenizer = build_world("markov", words=9, document=30, seed=3), data.tokenizer
    special = (tokenizer.begin_id, tokenizer.end_id, tokenizer.mask_id, tokenizer.vocab_size)
    assert special == (world.begin_id, world.end_id, world.mask_id, world.vocab_size)
    assert tokenizer.encode("w3 w0  w8").tolist() == [3, 0, 8] and tokenizer.decode([3, 0, 8, world.end_id]) == "w3 w0 w8"
    written = np.concatenate([[*text, world.end_id] for text in world.documents(20_000, seed=[0, 0])])
    train = data.split("train")
    np.testing.assert_array_equal(train.read(0, train.num_tokens), written)


def test_splits_are_independent_texts_of_the_same_language(data):
    assert set(data.manifest.splits) == {"train", "valid", "test"} and data.manifest.held_out["rule"] == "named"
    valid, test = (data.split(name).read(0, 2000) for name in ("valid", "test"))
    assert not np.array_equal(valid, test)
    assert data.split("valid").num_tokens >= 2**14


def test_the_manifest_says_what_no_model_can_pass(data):
    world = build_world("markov", words=9, document=30, seed=3)
    assert data.manifest.source["name"] == SPEC and data.manifest.tokenizer["spec"] == "words"
    assert data.manifest.source["entropy_rate"] == world.entropy_rate
    assert data.manifest.source["brier_ceilings"] == world.ceilings().tolist()


def test_another_draw_is_other_text_of_the_same_language(data, tmp_path):
    other = prepare(SPEC + ",draw=1", tmp_path / "data", quiet=True)
    assert other.source["sha256"] != data.manifest.source["sha256"]
    assert other.tokenizer["fingerprint"] == data.manifest.tokenizer["fingerprint"]


@pytest.mark.parametrize(
    ("source", "tokenizer", "words"),
    [
        ("world:novel", "auto", "choose markov, grammar, key-value"),
        ("world:markov:words", "auto", "KEY=VALUE"),
        ("world:markov:tokens=0", "auto", "tokens >= 1"),
        ("world:grammar:words=3", "auto", "unknown setting 'words'"),
        ("novel.txt", "word", "bytes, bpe:SIZE, words"),
    ],
)
def test_bad_names_are_one_line(tmp_path, monkeypatch, source, tokenizer, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("Call me Ishmael. " * 20)
    with pytest.raises(UsageError, match=words):
        prepare(source, tmp_path, tokenizer, quiet=True)
    assert not list(tmp_path.glob("manifest.json"))
