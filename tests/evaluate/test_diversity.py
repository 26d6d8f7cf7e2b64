"""Repetition and distinctness, against counts made by hand."""

import numpy as np
import pytest

from calm.errors import UsageError
from calm.evaluate.diversity import distinct, ngrams, repeated


def row(*tokens):
    return np.array(tokens, np.int32)


def test_repeated_ngrams_are_those_that_stood_there_before():
    # ab ba ab ba: two of four bigrams came before; a text of one token has no bigram
    np.testing.assert_array_equal(repeated([row(1, 2, 1, 2, 1), row(1, 2, 3), row(7)], 2), [[2, 4], [0, 2], [0, 0]])
    np.testing.assert_array_equal(repeated([row(5, 5, 5, 5)], 1), [[3, 4]])


def test_repetition_is_counted_within_a_text_and_distinctness_over_all():
    rows = [row(1, 2, 3), row(1, 2, 3)]
    assert repeated(rows, 2)[:, 0].sum() == 0
    assert distinct(rows, 2) == 2 / 4 and distinct(rows, 1) == 3 / 6


def test_no_ngrams_at_all():
    assert ngrams(row(1, 2), 3).shape == (0, 3)
    assert np.isnan(distinct([row(1)], 2)) and np.isnan(distinct([], 1))
    with pytest.raises(UsageError, match="at least 1"):
        ngrams(row(1), 0)
