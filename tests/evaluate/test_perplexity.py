"""Perplexity: the same nats over tokens, words and bytes; each word of a text counted once; the reading of each level."""

import math

import numpy as np
import pytest

from calm.core.intervals import BlockSums
from calm.errors import UsageError
from calm.evaluate.bits_per_byte import bits_per_byte
from calm.evaluate.blocks import checked
from calm.evaluate.perplexity import ScoredText, word_perplexity
from calm.evaluate.perplexity_report import PerplexityReport
from calm.text.tokenizer import ByteTokenizer
from calm.text.tokenizer_training import train_bpe, train_words
from calm.text.words import count_words
from calm.token.likelihood import windows

TEXT = " = Foxes = \n The fox läuft over the bridge , and the dog läuft after it .\n\n" * 6
BYTES, BPE, WORDS = ByteTokenizer(), train_bpe([TEXT], 290), train_words([TEXT], 14)


def blocks_of(tokenizer, length):
    ids = tokenizer.encode(TEXT)
    return ids[: len(ids) // length * length].reshape(-1, length)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, WORDS], ids=["bytes", "bpe", "words"])
@pytest.mark.parametrize("skip", [1, 3])
def test_words_and_bytes_of_blocks_are_those_of_the_text_behind_what_is_only_read(tokenizer, skip):
    blocks = blocks_of(tokenizer, 8)
    scored = ScoredText.of(tokenizer, blocks, skip)
    for words, block in zip(scored.words, blocks, strict=True):
        whole, before = tokenizer.decode(block), tokenizer.decode(block[:skip])
        assert words == count_words(whole) - count_words(before)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, WORDS], ids=["bytes", "bpe", "words"])
def test_no_word_is_counted_twice_and_none_is_lost_between_windows_that_overlap(tokenizer):
    ids = tokenizer.encode(TEXT)
    starts, first = windows(len(ids), 24, 8)
    rows = ids[starts[:, None] + np.arange(24)]
    scored = ScoredText.of(tokenizer, rows, first)
    begun = count_words(tokenizer.decode(ids[:1]))
    # A window may begin within a word, whose rest then looks like a word of its own, on both sides of the difference.
    assert scored.words.sum() == count_words(tokenizer.decode(ids)) - begun
    np.testing.assert_allclose(scored.bytes.sum(), len(tokenizer.decode(ids[1:]).encode()), rtol=0.1)


def test_at_word_level_a_word_is_a_token_and_per_word_is_the_perplexity():
    blocks = blocks_of(WORDS, 10)
    scored = ScoredText.of(WORDS, blocks, 1)
    np.testing.assert_array_equal(scored.words, 9)
    assert scored.unknown == (blocks[:, 1:] == WORDS.unknown_id).sum() > 0
    total, document = 9 * np.linspace(3, 5, len(blocks))[:, None], np.arange(len(blocks))
    nats = BlockSums(total=total, count=scored.words, document=document, block_tokens=10)
    assert word_perplexity(nats, scored.words).estimate == pytest.approx(math.exp(nats.means[0]))
    ended = blocks.copy()
    ended[:, 5] = WORDS.end_id  # nats and no word
    np.testing.assert_array_equal(ScoredText.of(WORDS, ended, 1).words, 8)


def test_one_likelihood_in_three_units():
    """exp(nats / words), exp(nats / tokens) and bits per byte are one number of nats, whatever the tokens are."""
    total, perplexities, bits = 500.0, [], []
    for tokenizer in (BYTES, BPE):
        ids = tokenizer.encode(TEXT)[None]
        scored = ScoredText.of(tokenizer, ids, 0)
        nats = BlockSums(
            total=np.array([[total]]), count=np.array([float(ids.size)]), document=np.zeros(1, int), block_tokens=ids.size
        )
        perplexities.append(word_perplexity(nats, scored.words).estimate)
        bits.append(bits_per_byte(nats, scored.bytes).estimate)
        tokens_per_word = ids.size / scored.words.sum()
        assert perplexities[-1] == pytest.approx(math.exp(nats.means[0] * tokens_per_word))
    assert perplexities == pytest.approx([math.exp(total / count_words(TEXT))] * 2)
    assert bits == pytest.approx([total / len(TEXT.encode()) / math.log(2)] * 2)


def test_each_level_says_how_it_is_published():
    all_three = (BYTES, BPE, WORDS)
    lines = {each.level: ScoredText.of(each, blocks_of(each, 8), 1).convention(99) for each in all_three}
    assert "quote bits/byte" in lines["byte"]
    assert "compares across tokenizers" in lines["subword"]
    assert "line ends counted" in lines["word"] and "% of them are <unk>" in lines["word"]
    whole = train_words([TEXT])
    assert "<unk>" not in ScoredText.of(whole, blocks_of(whole, 8), 1).convention(99)


def test_a_perplexity_beyond_floats_stays_a_number():
    nats = BlockSums(total=np.array([[9e5]]), count=np.ones(1), document=np.zeros(1, int), block_tokens=8)
    assert math.isfinite(word_perplexity(nats, np.ones(1)).estimate)


def test_words_that_do_not_fit_are_refused():
    nats = BlockSums(total=np.ones((2, 1)), count=np.ones(2), document=np.arange(2), block_tokens=64)
    with pytest.raises(UsageError, match="2 blocks and 3 numbers"):
        word_perplexity(nats, np.ones(3))
    with pytest.raises(UsageError, match="no word"):
        word_perplexity(nats, np.zeros(2))


def test_the_report_of_a_sliding_window_holds_every_unit():
    blocks = blocks_of(BPE, 8)
    document = np.arange(len(blocks))
    sums = BlockSums(total=np.full((len(blocks), 1), 7.0), count=np.full(len(blocks), 7.0), document=document, block_tokens=4)
    scored = ScoredText.of(BPE, blocks, 1)
    text = checked(blocks, document, 1, None)
    report = PerplexityReport(name="token LM", protocol=text, stride=4, likelihood=sums, scored=scored)
    values = report.to_dict()
    assert values["nats_per_token"]["estimate"] == 1 and values["perplexity"]["estimate"] == pytest.approx(math.e)
    per_word = math.exp(sums.total.sum() / scored.words.sum())
    assert values["word_perplexity"]["estimate"] == pytest.approx(per_word)
    assert values["scored_tokens"] == 7 * len(blocks) and values["protocol"]["stride"] == 4
    assert "at least 4 before it" in report.table() and scored.convention(values["scored_tokens"]) in report.table()
