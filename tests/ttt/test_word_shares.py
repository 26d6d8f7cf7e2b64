"""Words are counted as a reader would: whole, in any case, without digits and signs."""

import numpy as np

from calm.ttt.word_shares import STOP_WORDS, word_counts, words_of


def test_words_are_letters_with_an_inner_apostrophe():
    assert words_of("The king's 3 men -- didn't THEY? <unk> x2") == ["the", "king's", "men", "didn't", "they", "unk", "x"]


def test_counts_are_of_the_words_asked_for_and_of_all():
    texts = ["The war of wars", "", "War! War? warm"]
    np.testing.assert_array_equal(word_counts(texts, {"war"}), [[1, 4], [0, 0], [2, 3]])
    np.testing.assert_array_equal(word_counts(texts, STOP_WORDS), [[2, 4], [0, 0], [0, 3]])
