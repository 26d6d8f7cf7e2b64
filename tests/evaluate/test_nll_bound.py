"""The likelihood bound's arithmetic: below the truth in expectation, and tighter with more samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.cross_entropy import plain_cross_entropy, target_log_prob
from calm.errors import UsageError
from calm.evaluate.nll_bound import SHARES, bound_curve, log_mean_exp, sample_sizes, smoothed

WEIGHTS = np.array([0.05, 0.15, 0.3, 0.5])
LOG_PROBS = np.log([0.9, 0.02, 1e-5, 0.1])  # of the target chunk under each of four latents
TRUTH = np.log(np.sum(WEIGHTS * np.exp(LOG_PROBS)))


def test_the_gap_is_never_negative_and_falls_with_the_number_of_samples():
    sizes = (1, 2, 4, 16, 64)
    picks = np.random.default_rng(0).choice(4, (64, 4000), p=WEIGHTS)
    gaps = TRUTH - np.asarray(bound_curve(jnp.asarray(LOG_PROBS, jnp.float32)[picks], sizes))
    mean, error = gaps.mean(0), gaps.std(0) / np.sqrt(len(gaps))
    assert (mean > -3 * error).all(), (mean, error)
    assert (np.diff(mean) < 0).all() and mean[0] > 1 and mean[-1] < 0.1, mean
    assert mean[0] == pytest.approx(TRUTH - WEIGHTS @ LOG_PROBS, abs=4 * error[0])  # one sample: the mean of the logarithms


def test_smaller_sizes_are_the_mean_over_groups():
    values = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    values = jnp.asarray(values)
    curve = bound_curve(values, (1, 3, 7))
    np.testing.assert_allclose(curve[:, 0], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(curve[:, 1], (log_mean_exp(values[:3]) + log_mean_exp(values[3:6])) / 2, rtol=1e-5)
    np.testing.assert_allclose(curve[:, 2], np.log(np.exp(values).mean(0)), rtol=1e-5)


def test_log_mean_exp_neither_overflows_nor_underflows():
    np.testing.assert_allclose(log_mean_exp(jnp.array([[-1000.0, 1000.0], [-1000.0, -1000.0]])), [-1000, 1000 - np.log(2)])


def test_smoothing_mixes_probabilities_and_stays_a_distribution():
    decoder, unigram = (jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(i), (1, 3, 50))) for i in (0, 1))
    mixed = jnp.exp(smoothed(decoder, unigram[0], 0.1))
    np.testing.assert_allclose(mixed, 0.9 * jnp.exp(decoder) + 0.1 * jnp.exp(unigram), rtol=1e-5)
    np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-5)
    impossible = jnp.full((1, 3, 50), -jnp.inf)
    np.testing.assert_allclose(smoothed(impossible, unigram[0], 0.1), jnp.log(0.1) + unigram, rtol=1e-5)


def test_every_size_up_to_the_number_of_samples_is_reported():
    assert sample_sizes(1) == (1,) and sample_sizes(8) == (1, 2, 4, 8) and sample_sizes(12) == (1, 2, 4, 8, 12)
    with pytest.raises(UsageError, match="at least 1 sample"):
        sample_sizes(0)
    assert SHARES[0] == pytest.approx(1e-4, rel=1e-3) and SHARES[-1] == pytest.approx(0.98) and list(SHARES) == sorted(SHARES)


@pytest.mark.parametrize("rows", [1, 512, 700])
def test_target_log_prob_is_cross_entropy_in_blocks(rows):
    hidden, table = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((rows, 8), (30, 8))))
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, 30)
    expected = -plain_cross_entropy(hidden, table, targets)
    np.testing.assert_allclose(target_log_prob(hidden, table, targets), expected, rtol=2e-5, atol=1e-5)
