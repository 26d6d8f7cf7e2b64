"""The exact sampler has exactly the law P^(1/T) / Z, uses as many draws as the closed form says, and says when they run out."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.exact import ExactTemperature
from calm.core.laws import draws_by_collisions, expected_draws, target
from calm.core.sampler import OutOfDraws, StepKeys
from calm.errors import CalmError, UsageError
from known_law import Known, P, chi_square, sample

TEMPERATURES = [Fraction(t) for t in ("1", "9/10", "7/10", "1/2", "2/5", "1/3")]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_law_and_the_cost_are_those_of_the_closed_forms(temperature):
    rows = 8_000
    chosen, choice = sample(ExactTemperature(temperature=temperature, block=16), rows=rows)
    assert not choice.ran_out.any() and not choice.fell_back.any()
    assert chi_square(chosen, target(P, temperature)) < 8
    draws = np.asarray(choice.draws, float)
    assert draws.mean() == pytest.approx(expected_draws(P, temperature), abs=5 * draws.std() / rows**0.5 + 1e-9)
    assert np.mean(choice.collision_rate) == pytest.approx((P**2).sum(), abs=0.02)  # a row stops where draws agree


@pytest.mark.parametrize("block", [1, 7])
def test_the_size_of_the_blocks_does_not_show_in_the_law(block):
    temperature = Fraction(3, 5)
    chosen, choice = sample(ExactTemperature(temperature=temperature, block=block), rows=5_000)
    assert chi_square(chosen, target(P, temperature)) < 8
    draws = np.asarray(choice.draws, float)
    assert draws.mean() == pytest.approx(expected_draws(P, temperature), abs=5 * draws.std() / 5_000**0.5)


def test_a_temperature_of_one_over_49_is_no_bernoulli_factory():
    """1 / (1/49) in floats is 48.99999999999999: 48 equal draws and a factory for the rest, which costs more draws."""
    sampler = ExactTemperature(temperature=Fraction(1, 49))
    assert (sampler.whole, sampler.rest) == (49, 0)
    assert ExactTemperature(temperature=Fraction(7, 10)).rest == Fraction(3, 7)
    chosen, choice = sample(sampler, law=np.array([0.99, 0.01]), rows=500)
    assert (chosen == 0).all() and (np.asarray(choice.draws) % 49 == 0).all()


def test_the_cost_grows_to_the_number_of_chunks_as_the_temperature_nears_one():
    zipf = 1 / np.arange(1, 100_001)
    zipf /= zipf.sum()
    assert expected_draws(zipf, Fraction(99, 100)) == pytest.approx(94_986, rel=1e-4)
    assert expected_draws(zipf, Fraction(1, 2)) == pytest.approx(177.7, rel=1e-3)
    assert expected_draws(zipf, Fraction(1)) == pytest.approx(1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_cost_read_off_a_collision_rate_is_that_of_even_chunks(temperature):
    even = np.full(50, 0.02)
    assert draws_by_collisions(0.02, temperature) == pytest.approx(expected_draws(even, temperature))
    rate = (P**2).sum()
    if Fraction(1, 2) <= temperature <= 1:
        assert draws_by_collisions(rate, temperature) <= expected_draws(P, temperature) * (1 + 1e-9)
    elif temperature.numerator == 1:
        assert draws_by_collisions(rate, temperature) >= expected_draws(P, temperature)
    assert draws_by_collisions(rate, Fraction(1, 2)) == pytest.approx(expected_draws(P, Fraction(1, 2)))


def test_a_row_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(4), (2, 6))
    sampler = ExactTemperature(temperature=Fraction(2, 5), block=4)

    def choose(rows):
        return sampler.sample(StepKeys(keys[0, rows], keys[1, rows]), Known(P, jnp.ones((len(rows),), bool)))

    together = choose(np.arange(6))
    assert len(set(together.draws.tolist())) > 2
    for row in range(6):
        for ours, theirs in zip(choose(np.array([row])), together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[row])


def test_rows_that_have_ended_draw_nothing():
    keys = jax.random.split(jax.random.key(4), (2, 2))
    flat = np.full(10_000, 1e-4)
    sampler = ExactTemperature(temperature=Fraction(1, 4), max_draws=10)
    choice = sampler.sample(StepKeys(*keys), Known(flat, jnp.zeros((2,), bool)))
    assert not choice.ran_out.any() and (np.asarray(choice.draws) == 0).all()


def test_running_out_names_draws_collision_rate_and_the_draws_expected():
    flat = np.full(500, 0.002)
    sampler = ExactTemperature(temperature=Fraction(1, 4), max_draws=1000)
    _, choice = sample(sampler, law=flat, rows=3)
    assert choice.ran_out.all()
    used, rate = int(choice.draws[0]), float(choice.collision_rate[0])
    assert 1000 <= used < 1000 + sampler.block and rate == pytest.approx(0.002, rel=0.5)
    error = sampler.out_of_draws("prompt 2, chunk 5", used, rate)
    assert isinstance(error, OutOfDraws) and isinstance(error, CalmError) and error.exit_code == 1
    expected = f"{draws_by_collisions(rate, Fraction(1, 4)):.3g} draws are expected"
    for part in ("prompt 2, chunk 5", "temperature 1/4", f"used {used} draws", f"collision rate {rate:.3g}", expected):
        assert part in str(error)
    assert error.draws == used and error.expected_draws == draws_by_collisions(rate, Fraction(1, 4))


def test_running_out_without_one_equal_pair_gives_the_least_that_is_needed():
    error = ExactTemperature(block=65).out_of_draws("prompt 0, chunk 0", 100, 0.0)
    assert "observed collision rate 0, for which more than 6.4e+03 draws are expected" in str(error)
    assert error.expected_draws == pytest.approx(2 * 100 * 64 / 2)


@pytest.mark.parametrize("temperature", [Fraction(0), Fraction(-1, 2), Fraction(11, 10)])
def test_temperatures_outside_zero_to_one_are_refused(temperature):
    with pytest.raises(UsageError, match="exact sampling needs 0 < T <= 1; the batch sampler takes any T above 0"):
        ExactTemperature(temperature=temperature)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(UsageError, match="max_draws and block must be at least 1, got 0 and 64"):
        ExactTemperature(max_draws=0)
