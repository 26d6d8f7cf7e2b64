"""The judge that adaptation never sees: it tells kinds of text apart without the words that it must not look at."""

import random

import numpy as np
import pytest

from calm.errors import UsageError
from calm.ttt.text_judge import BUCKETS, STOP_WORDS, fit_judge, word_counts, words_of


def texts(kind, count=60, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choice(kind) for _ in range(8)) for _ in range(count)]


SEA = ["sea", "ship", "sail", "the", "of", "wave"]
LAND = ["field", "road", "horse", "the", "of", "hill"]


def test_it_tells_kinds_of_text_apart_on_texts_that_it_was_not_fitted_on():
    judge = fit_judge(texts(SEA), texts(LAND, 200, seed=1))
    assert judge.area > 0.98
    assert (judge(texts(SEA, seed=2)) > 0).mean() > 0.95 > 0.05 > (judge(texts(LAND, seed=3)) > 0).mean()
    assert judge(["the sea"])[0] > judge(["the of"])[0] > judge(["the field"])[0]


def test_hidden_words_do_not_count():
    judge = fit_judge(texts(SEA), texts(LAND), hidden=["sea", "Ship"])
    np.testing.assert_array_equal(judge(["the wave sea ship"]), judge(["the wave"]))
    assert judge.area > 0.95
    blind = fit_judge(texts(SEA), texts(LAND), hidden=[*SEA, *LAND])
    assert 0.4 < blind.area < 0.6


def test_labels_that_mean_nothing_give_an_area_of_a_half():
    assert 0.25 < fit_judge(texts(SEA, 80), texts(SEA, 80, seed=1)).area < 0.75


def test_decay_shrinks_it_and_nothing_about_it_is_random():
    """More decay gives smaller weights, and the same texts the same judge."""
    wanted, unwanted = texts(SEA, 20), texts(LAND, 20, seed=1)
    one = fit_judge(wanted, unwanted, decay=0.05)
    two = fit_judge(wanted, unwanted, decay=0.5)
    assert one.weights.shape == (BUCKETS,)
    assert np.abs(two.weights).sum() < np.abs(one.weights).sum()
    again = fit_judge(wanted, unwanted, decay=0.05)
    np.testing.assert_array_equal(one.weights, again.weights)


def test_too_few_texts_are_refused():
    with pytest.raises(UsageError, match="3 wanted texts are too few, it needs 8"):
        fit_judge(texts(SEA, 3), texts(LAND))


def test_words_are_letters_with_an_inner_apostrophe():
    assert words_of("The king's 3 men -- didn't THEY? <unk> x2") == ["the", "king's", "men", "didn't", "they", "unk", "x"]


def test_counts_are_of_the_words_asked_for_and_of_all():
    texts = ["The war of wars", "", "War! War? warm"]
    np.testing.assert_array_equal(word_counts(texts, {"war"}), [[1, 4], [0, 0], [2, 3]])
    np.testing.assert_array_equal(word_counts(texts, STOP_WORDS), [[2, 4], [0, 0], [0, 3]])
