"""The n-gram baselines: proper distributions, exact scores, counts that do not depend on how they were read."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.brier_lm import brier_argmax
from calm.errors import UsageError
from calm.evaluate.ngram import exact_brier, fit_ngrams, log_prob, sample


@dataclasses.dataclass
class ArraySplit:
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int32)


VOCABULARY = 5
# Token 4 is never followed by anything but itself and token 3 never occurs: unseen contexts and unseen tokens are
# covered.
SPLIT = ArraySplit(np.random.default_rng(0).choice([0, 1, 2, 4], size=300, p=[0.5, 0.3, 0.15, 0.05]))


@pytest.fixture(scope="module", params=[0, 1], ids=["unigram", "bigram"])
def model(request):
    return fit_ngrams(SPLIT, VOCABULARY)[request.param]


def brute_force(model, context: int, length: int) -> dict[tuple[int, ...], float]:
    table = {}
    for gram in itertools.product(range(VOCABULARY), repeat=length):
        before = (context, *gram[:-1])
        table[gram] = float(np.prod([model.conditional(np.array(x), np.array(y)) for x, y in zip(before, gram, strict=True)]))
    return table


def test_every_context_has_a_distribution_over_the_whole_vocabulary(model):
    contexts, tokens = np.meshgrid(np.arange(VOCABULARY), np.arange(VOCABULARY), indexing="ij")
    table = model.conditional(contexts, tokens)
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-12)
    assert (table > 0).all()


def test_witten_bell_by_hand():
    _, bigram = fit_ngrams(ArraySplit(np.array([0, 1, 0, 1, 0, 2])), 4)
    # 0 -> 1 twice and 0 -> 2 once: c = 3, t = 2; unigram counts 3 2 1 0: c = 6, t = 3.
    unigram = (np.array([3, 2, 1, 0]) + 3 / 4) / 9
    expected = (np.array([0, 2, 1, 0]) + 2 * unigram) / 5
    np.testing.assert_allclose(bigram.conditional(np.zeros(4, int), np.arange(4)), expected)


def test_closed_form_equals_enumeration(model):
    for context in range(VOCABULARY):
        for length in (1, 2, 3, 4):
            table = brute_force(model, context, length)
            target = np.array([2, 0, 1, 4])
            expected = 2 * table[tuple(target[:length])] - sum(p**2 for p in table.values())
            assert exact_brier(model, np.array(context), target)[length - 1] == pytest.approx(expected, rel=1e-10)


def test_sampled_scores_average_to_the_closed_form(model):
    contexts, generator = np.repeat(np.arange(VOCABULARY), 4000), np.random.default_rng(1)
    targets = generator.choice([0, 1, 2, 4], size=(len(contexts), 4), p=[0.6, 0.2, 0.1, 0.1])
    tokens = sample(model, contexts, num_tokens=4, num_samples=4, seed=2)
    difference = np.asarray(brier_argmax(jnp.asarray(tokens), jnp.asarray(targets))) - exact_brier(model, contexts, targets)
    error = difference.std(0) / np.sqrt(len(contexts))
    assert (np.abs(difference.mean(0)) < 3.5 * error).all()


@pytest.mark.parametrize("place", [0, 1], ids=["unigram", "bigram"])
def test_draws_follow_the_conditional(place):
    model = fit_ngrams(ArraySplit(np.array([0, 1, 0, 1, 0, 2, 3, 3])), 5)[place]  # rows of a few counts each
    draws = 20_000
    for context in range(5):
        expected = model.conditional(np.full(5, context), np.arange(5))
        tokens = sample(model, np.full(draws, context), num_tokens=1, num_samples=1, seed=context)
        shares = np.bincount(tokens.reshape(-1), minlength=5) / draws
        assert (np.abs(shares - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_log_probability_is_that_of_the_chain(model):
    tokens = np.array([1, 2, 0])
    expected = np.log(brute_force(model, 4, 3)[(1, 2, 0)])
    assert log_prob(model, np.array(4), tokens).sum() == pytest.approx(expected)


@pytest.mark.parametrize("batch_tokens", [1, 7, 64])
def test_reading_in_pieces_changes_nothing(batch_tokens):
    whole, pieces = fit_ngrams(SPLIT, VOCABULARY)[1], fit_ngrams(SPLIT, VOCABULARY, batch_tokens=batch_tokens)[1]
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    assert pieces.counts.sum() == SPLIT.num_tokens - 1


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(UsageError, match="token id 4, the vocabulary has 4"):
        fit_ngrams(SPLIT, 4)
    with pytest.raises(UsageError, match="at least one token"):
        fit_ngrams(ArraySplit(np.zeros(0, int)), 4)
