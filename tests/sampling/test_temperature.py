"""Batch temperature: its law at finite N, by enumeration and on the device; equal chunks are counted exactly."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.errors import UsageError
from calm.sampling.temperature import (
    BatchTemperature,
    PlainSampler,
    count_by_pairs,
    count_by_sorting,
    count_equal,
    from_temperature,
    log_weights,
)

P = np.array([0.4, 0.3, 0.2, 0.1])


def outcomes(total: int) -> np.ndarray:
    """All ways to share `total` draws among four chunks, `[R 4]`."""
    cuts = np.array(list(itertools.combinations(range(total + 3), 3)))
    ends = np.concatenate([cuts, np.full((len(cuts), 1), total + 3)], axis=1)
    return np.diff(ends, axis=1, prepend=-1) - 1


def law(n: int, total: int) -> np.ndarray:
    """The probability of each chunk under the sampler, summed over every possible count."""
    counts = outcomes(total)
    log_factorial = np.array([math.lgamma(c + 1.0) for c in range(total + 1)])
    chance = np.exp(log_factorial[total] - log_factorial[counts].sum(1) + counts @ np.log(P))
    assert chance.sum() == pytest.approx(1.0, abs=1e-6)
    of_one = np.asarray(log_weights(jnp.asarray(counts), n, total), np.float64)
    weight = np.where(counts > 0, counts * np.exp(of_one - of_one.max(1, keepdims=True)), 0.0)
    return chance @ (weight / weight.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("n", "total", "expected"),
    [(2, 10, 0.0339), (2, 50, 0.0087), (2, 200, 0.0023), (3, 10, 0.0924), (3, 50, 0.0287), (3, 200, 0.0082)],
)
def test_the_finite_law_is_as_far_from_the_target_as_enumeration_says(n, total, expected):
    target = P**n / (P**n).sum()
    assert np.abs(law(n, total) - target).sum() / 2 == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("n", "total"), [(3, 6), (2, 10)])
def test_draws_on_the_device_follow_the_finite_law(n, total):
    rounds, sampler = 20_000, BatchTemperature(n=n, num_candidates=total)
    drawn = jax.random.categorical(jax.random.key(1), jnp.log(jnp.asarray(P)), shape=(rounds, total)).astype(jnp.int32)
    chunks = jnp.stack([drawn, 3 - drawn], axis=-1)
    index, fell_back = jax.jit(jax.vmap(sampler.choose))(jax.random.split(jax.random.key(2), rounds), chunks)
    chosen = np.take_along_axis(np.asarray(drawn), np.asarray(index)[:, None], axis=1)[:, 0]
    expected = rounds * law(n, total)
    chi_square = ((np.bincount(chosen, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 99.9 % of three degrees of freedom

    counts = outcomes(total)
    factorial = np.array([math.factorial(c) for c in range(total + 1)], float)
    chance = factorial[total] / factorial[counts].prod(1) * (P**counts).prod(1)
    share = chance[counts.max(1) < n].sum()
    assert np.mean(fell_back) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / rounds) + 1e-9)


def test_a_fallback_chooses_evenly_among_the_chunks_of_largest_count():
    candidates = jnp.asarray([[1], [1], [2], [2], [3]])
    index, fell_back = jax.vmap(BatchTemperature(n=3, num_candidates=5).choose, (0, None))(
        jax.random.split(jax.random.key(0), 4000), candidates
    )
    chosen = np.asarray(candidates[index, 0])
    assert fell_back.all() and set(chosen) == {1, 2}
    assert np.mean(chosen == 1) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("size", [1, 7, 300, 500])
def test_counting_by_pairs_and_by_sorting_agree_with_a_dictionary(size):
    chunks = np.random.default_rng(0).integers(0, 4, (size, 3), np.int32)
    chunks[:, 0] *= 100_000  # ids of a large vocabulary
    listed = [tuple(chunk) for chunk in chunks.tolist()]
    expected = [listed.count(chunk) for chunk in listed]
    for count in (count_by_pairs, count_by_sorting, count_equal):
        np.testing.assert_array_equal(count(jnp.asarray(chunks)), expected)


def test_a_temperature_is_one_over_a_whole_number_exactly():
    assert from_temperature(1) == PlainSampler() == from_temperature(1.0, candidates=7)
    assert from_temperature(0.5, candidates=50) == BatchTemperature(n=2, num_candidates=50)
    for n in range(2, 200):  # 1 / (1 / 49) is not 49
        assert (
            from_temperature(1 / n) == from_temperature(Fraction(1, n)) == from_temperature(f"1/{n}") == BatchTemperature(n=n)
        )


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0.4, "0.4 is not 1/n .* 1/2 or 1/3"),
        (0.33, "1/3 or 1/4"),
        (0.9, "1 or 1/2"),
        (1.5, "above 1; the nearest allowed is 1"),
        (0, "must be above 0"),
        (-1.0, "must be above 0"),
        (float("nan"), "not a number"),
        ("warm", "not a number"),
        (1 / 300, "1 <= 300 <= candidates, got candidates=200"),
    ],
)
def test_other_temperatures_are_refused_with_the_nearest_allowed(temperature, message):
    with pytest.raises(UsageError, match=message):
        from_temperature(temperature)
