"""Batch temperature has exactly the law that enumeration gives, at any temperature; temperatures are read exactly."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.laws import batch_law, binomials, shares, target, total_variation
from calm.core.temperature import BatchTemperature, exact_temperature, log_weights
from calm.errors import UsageError
from known_law import P, chi_square, sample

ANY = [Fraction(t) for t in ("1/3", "2/5", "1/2", "3/5", "4/5", "1", "3/2", "5")]


@pytest.mark.parametrize(
    ("n", "total", "expected"),
    [(2, 10, 0.0339), (2, 50, 0.0087), (2, 200, 0.0023), (3, 10, 0.0924), (3, 50, 0.0287), (3, 200, 0.0082)],
)
def test_the_finite_law_is_as_far_from_the_target_as_enumeration_says(n, total, expected):
    temperature = Fraction(1, n)
    assert total_variation(batch_law(P, temperature, total).law, target(P, temperature)) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("temperature", ANY)
def test_draws_on_the_device_follow_the_enumerated_law(temperature):
    rows, total = 20_000, 4
    expected = batch_law(P, temperature, total)
    chosen, choice = sample(BatchTemperature(temperature=temperature, num_candidates=total), rows=rows)
    assert chi_square(chosen, expected.law) < 8
    share = expected.fallback_share
    assert np.mean(choice.fell_back) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / rows) + 1e-9)
    assert (share > 0) == (temperature <= Fraction(1, 2))  # above, a chunk drawn once has a weight
    np.testing.assert_array_equal(choice.draws, total)


def test_the_law_is_enumerated_over_every_way_to_share_draws_out():
    counts = shares(5, 3)
    assert len({tuple(row) for row in counts.tolist()}) == len(counts) == math.comb(7, 2) and (counts.sum(1) == 5).all()


@pytest.mark.parametrize("temperature", [Fraction(1, 2), Fraction(1, 3), Fraction(1)])
def test_at_one_over_n_the_weight_is_the_number_of_ways_to_pick_n(temperature):
    n = 1 / temperature
    ways = np.array([math.comb(c, int(n)) for c in range(13)], float)
    np.testing.assert_allclose(binomials(12, temperature), ways / ways.max())
    ours = np.exp(np.asarray(log_weights(jnp.arange(13), temperature, 12)))
    np.testing.assert_allclose(ours, ways, rtol=1e-4)


@pytest.mark.parametrize("temperature", ANY)
def test_weights_from_ratios_and_from_log_gammas_agree(temperature):
    ours = np.exp(np.asarray(log_weights(jnp.arange(31), temperature, 30)))
    np.testing.assert_allclose(ours / ours.max(), binomials(30, temperature), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("temperature", [Fraction(2, 5), Fraction(7, 10), Fraction(2)])
def test_the_bias_falls_with_the_number_of_draws(temperature):
    far, near = (total_variation(batch_law(P, temperature, size).law, target(P, temperature)) for size in (10, 80))
    assert near < far / 4


def test_above_temperature_one_a_step_of_different_draws_is_a_step_at_one():
    weights = log_weights(jnp.array([1, 1, 1, 0]), Fraction(3), 3)
    assert weights[0] == weights[1] == weights[2] and weights[3] == -jnp.inf


@pytest.mark.parametrize("temperature", [Fraction(1, 3), Fraction(2, 5)])
def test_a_fallback_chooses_evenly_among_the_chunks_of_largest_count(temperature):
    candidates = (
        jnp.asarray([[1], [1], [2], [3], [3]])[:, :1] if temperature == Fraction(1, 3) else jnp.asarray([[1], [2], [3]])
    )
    sampler = BatchTemperature(temperature=temperature, num_candidates=len(candidates))
    index, fell_back = jax.vmap(sampler.choose, (0, None))(jax.random.split(jax.random.key(0), 4000), candidates)
    chosen = np.asarray(candidates[index, 0])
    often = {1, 3} if temperature == Fraction(1, 3) else {1, 2, 3}
    assert fell_back.all() and set(chosen.tolist()) == often
    assert np.mean(chosen == 1) == pytest.approx(1 / len(often), abs=0.04)


def test_a_temperature_is_read_exactly():
    assert exact_temperature(0.7) == exact_temperature("0.7") == Fraction(7, 10)
    assert exact_temperature(1) == exact_temperature("1.0") == 1 and exact_temperature(2.5) == Fraction(5, 2)
    for n in range(2, 200):  # 1 / (1 / 49) is not 49
        assert exact_temperature(1 / n) == exact_temperature(Fraction(1, n)) == exact_temperature(f"1/{n}") == Fraction(1, n)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (0, "temperature 0: must be above 0"),
        (-1.0, "must be above 0"),
        ("-1/2", "must be above 0"),
        ("0", "temperature 0.0: must be above 0"),
        (float("nan"), "not a number"),
        (float("inf"), "not a number"),
        ("warm", "not a number; give one above 0, such as 0.7 or 1/3"),
        ("1/0", "not a number"),
    ],
)
def test_what_is_no_temperature_is_refused(temperature, message):
    with pytest.raises(UsageError, match=message):
        exact_temperature(temperature)


def test_a_temperature_that_so_few_draws_cannot_reach_is_refused():
    with pytest.raises(UsageError, match="temperature 1/300 needs candidates >= 300, got candidates=200"):
        BatchTemperature(temperature=Fraction(1, 300))
    BatchTemperature(temperature=Fraction(1, 200))
    with pytest.raises(UsageError, match="must be above 0"):
        BatchTemperature(temperature=Fraction(0))
