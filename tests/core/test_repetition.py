"""A chunk repeats if it ends a run of tokens that the row has had, at whatever phase; samplers keep to the rest of the law."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.counts import BestOfN
from calm.core.exact import ExactTemperature
from calm.core.laws import expected_draws, target
from calm.core.repetition import repeats
from calm.core.temperature import BatchTemperature
from calm.text.chunking import NOTHING
from known_law import P, chi_square, sample


def by_lists(history, chunk, length) -> bool:
    """Whether the last runs of history + chunk occur earlier, in plain Python."""
    text = [*history, *chunk]
    runs = [tuple(text[start : start + length]) for start in range(len(text) - length + 1)]
    first = max(len(runs) - len(chunk), 0)
    return any(runs[place] in runs[:place] for place in range(first, len(runs)))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("width", [1, 4])
def test_runs_are_found_as_lists_find_them(length, width):
    generator = np.random.default_rng(length * 10 + width)
    room, tokens = 14, 5 if length < 3 else 2
    sizes = np.array([0, 1, 6, room])
    history = np.full((4, room), NOTHING, np.int32)
    for row, size in enumerate(sizes):
        history[row, room - size :] = generator.integers(0, tokens, size)
    chunks = generator.integers(0, tokens, (40, 4, width), np.int32)
    found = np.asarray(repeats(jnp.asarray(history), jnp.asarray(chunks), length))
    expected = [
        [by_lists(history[row, room - sizes[row] :], chunk, length) for row, chunk in enumerate(rows)] for rows in chunks
    ]
    np.testing.assert_array_equal(found, expected)
    assert np.any(expected) or length == 9


def test_a_run_longer_than_the_history_is_no_repetition():
    assert not repeats(jnp.full((1, 2), NOTHING), jnp.ones((1, 1, 2), jnp.int32), 4).any()


HISTORY = np.array([NOTHING, 0, 100, 7, 2, 100])  # outcome 0 is the chunk (0, 100): a run of two that has been
ALLOWED = P * [0, 1, 1, 1] / 0.6


@pytest.mark.parametrize("temperature", [Fraction(1), Fraction(2, 5), Fraction(1, 2)])
def test_the_exact_sampler_has_the_law_without_repetitions(temperature):
    sampler = ExactTemperature(temperature=temperature, no_repeat=2, block=16)
    chosen, choice = sample(sampler, history=HISTORY, rows=5_000)
    expected = target(P, temperature) * [0, 1, 1, 1]
    assert chi_square(chosen, expected / expected.sum()) < 8
    # acceptance falls by the share of what is refused
    draws = np.asarray(choice.draws, float)
    assert draws.mean() == pytest.approx(expected_draws(P, temperature) / expected.sum(), abs=5 * draws.std() / 5_000**0.5)


def test_counting_samplers_choose_among_what_repeats_nothing():
    one = BatchTemperature(temperature=Fraction(1), num_candidates=8, no_repeat=2)
    chosen, choice = sample(one, history=HISTORY)
    stuck = np.asarray(choice.fell_back)
    assert stuck.mean() == pytest.approx(P[0] ** 8, abs=0.002) and (chosen[stuck] == 0).all()
    assert chi_square(chosen[~stuck], ALLOWED) < 8
    best = sample(BestOfN(num_candidates=200, no_repeat=2), history=HISTORY, rows=500)[0]
    assert np.mean(best == 1) > 0.95 and not (best == 0).any()


def test_where_every_chunk_repeats_the_counting_samplers_fall_back_and_the_exact_one_runs_out():
    history = np.concatenate([[outcome, outcome + 100] for outcome in range(4)])
    for sampler in (BatchTemperature(temperature=Fraction(1, 9), no_repeat=2), BestOfN(no_repeat=2)):
        chosen, choice = sample(sampler, history=history, rows=200)
        assert choice.fell_back.all() and np.mean(chosen == 0) > 0.55  # by the counts of all; a plain draw gives .4
    assert sample(ExactTemperature(max_draws=300, no_repeat=2), history=history, rows=50)[1].ran_out.all()
