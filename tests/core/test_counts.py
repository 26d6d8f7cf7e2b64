"""Top-k, top-p, min-p and the vote have the law of a plain count over every sequence of draws."""

import itertools
from collections import Counter
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.choose import from_temperature
from calm.core.counts import BestOfN, Filters, tally, tally_by_pairs, tally_by_sorting
from calm.core.exact import ExactTemperature
from calm.core.laws import binomials
from calm.core.sampler import PlainSampler
from calm.core.temperature import BatchTemperature
from calm.errors import UsageError
from known_law import P, chi_square, sample

TOTAL = 5


def kept(weights: dict[int, float], filters: Filters) -> dict[int, float]:
    """The chunks that stay, in plain Python; `weights` come in the order in which they were drawn."""
    ranked = sorted(weights.items(), key=lambda item: -item[1])[: filters.top_k]
    if filters.top_p is not None:
        whole, needed = sum(w for _, w in ranked), []
        for item in ranked:
            needed.append(item)
            if sum(w for _, w in needed) >= filters.top_p * whole - 1e-9:
                break
        ranked = needed
    if filters.min_p is not None:
        ranked = [item for item in ranked if item[1] >= filters.min_p * ranked[0][1] - 1e-9]
    return dict(ranked)


def law_by_sequences(choose, total=TOTAL) -> np.ndarray:
    """The probability of each outcome, over all sequences of draws; `choose(sequence)` gives weights of what may be chosen."""
    law = np.zeros(len(P))
    for sequence in itertools.product(range(len(P)), repeat=total):
        weights = choose(sequence)
        for outcome, weight in weights.items():
            law[outcome] += P[list(sequence)].prod() * weight / sum(weights.values())
    return law


@pytest.mark.parametrize("temperature", [Fraction(1), Fraction(1, 2), Fraction(2)])
@pytest.mark.parametrize(
    "filters",
    [Filters(top_k=2), Filters(top_p=0.6), Filters(min_p=0.5), Filters(top_k=3, top_p=0.8, min_p=0.3), Filters(top_k=1)],
    ids=str,
)
def test_filters_have_the_law_of_a_plain_count(filters, temperature):
    table = binomials(TOTAL, temperature)

    def choose(sequence):
        counts = Counter(sequence)
        weights = {outcome: table[count] for outcome, count in counts.items() if table[count] > 0}
        most = max(counts.values())
        return kept(weights or {outcome: 1.0 for outcome, count in counts.items() if count == most}, filters)

    expected = law_by_sequences(choose)
    sampler = BatchTemperature(temperature=temperature, num_candidates=TOTAL, filters=filters)
    assert chi_square(sample(sampler)[0], expected) < 8


def test_the_best_of_n_is_the_most_frequent_and_of_equals_the_first():
    def choose(sequence):
        return {Counter(sequence).most_common(1)[0][0]: 1.0}  # equal counts: in the order of first occurrence

    chosen, choice = sample(BestOfN(num_candidates=TOTAL))
    assert chi_square(chosen, law_by_sequences(choose)) < 8
    assert (
        not choice.fell_back.any() and (np.asarray(choice.draws) == TOTAL).all()
    )  # five draws of four chunks cannot all differ
    undecided = np.mean(sample(BestOfN(num_candidates=2))[1].fell_back)
    assert undecided == pytest.approx(1 - (P**2).sum(), abs=0.02)


def test_the_best_of_one_is_a_draw_and_of_many_the_mode():
    chosen, choice = sample(BestOfN(num_candidates=1))
    assert chi_square(chosen, P) < 5 and not choice.fell_back.any()
    assert np.mean(sample(BestOfN(num_candidates=300), rows=500)[0] == 0) > 0.97


def test_filters_at_their_limits_change_nothing():
    weights = jnp.log(jnp.array([0.5, 0.2, 0.2, 0.1]))
    for filters in (Filters(), Filters(top_k=4), Filters(top_p=1.0), Filters(top_k=9, min_p=1e-9)):
        np.testing.assert_array_equal(filters(weights), weights)
    assert not Filters() and Filters(top_k=4)


def test_of_equal_weights_the_first_drawn_stays():
    weights = jnp.array([-jnp.inf, 0.0, -1.0, 0.0])
    np.testing.assert_array_equal(Filters(top_k=1)(weights), [-np.inf, 0.0, -np.inf, -np.inf])
    np.testing.assert_array_equal(Filters(min_p=1.0)(weights), [-np.inf, 0.0, -np.inf, 0.0])


@pytest.mark.parametrize("size", [1, 7, 300, 500])
def test_tallies_by_pairs_and_by_sorting_agree_with_a_dictionary(size):
    chunks = np.random.default_rng(0).integers(0, 4, (size, 3), np.int32)
    chunks[:, 0] *= 100_000  # ids of a large vocabulary
    listed = [tuple(chunk) for chunk in chunks.tolist()]
    expected = [listed.count(chunk) if listed.index(chunk) == place else 0 for place, chunk in enumerate(listed)]
    for count in (tally_by_pairs, tally_by_sorting, tally):
        np.testing.assert_array_equal(count(jnp.asarray(chunks)), expected)


def test_options_become_the_sampler_that_they_describe():
    half = Fraction(1, 2)
    assert from_temperature() == from_temperature(1.0, candidates=7) == from_temperature(1, kind="exact") == PlainSampler()
    assert from_temperature(0.5, 50) == BatchTemperature(temperature=half, num_candidates=50)
    assert from_temperature("2.5") == BatchTemperature(temperature=Fraction(5, 2))
    assert from_temperature(0.7, kind="exact", max_draws=9) == ExactTemperature(temperature=Fraction(7, 10), max_draws=9)
    assert from_temperature(kind="best", candidates=9, no_repeat=3) == BestOfN(num_candidates=9, no_repeat=3)
    assert from_temperature(1, 8, top_p=0.9) == BatchTemperature(
        temperature=Fraction(1), num_candidates=8, filters=Filters(top_p=0.9)
    )
    assert from_temperature(1, kind="exact", no_repeat=4) == ExactTemperature(temperature=Fraction(1), no_repeat=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0), "must be above 0"),
        (dict(temperature=1.5, kind="exact"), "exact sampling needs 0 < T <= 1"),
        (dict(kind="greedy"), "unknown sampler 'greedy'; choose batch, exact, best"),
        (dict(temperature=0.5, kind="exact", top_k=4), "use the batch sampler, not 'exact'"),
        (dict(temperature=0.5, kind="best"), "at no temperature: leave out 0.5"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(min_p=1.2), "min_p must be above 0 and at most 1, got 1.2"),
        (dict(no_repeat=0), "no_repeat must be at least 1 token, got 0"),
        (dict(candidates=0), "candidates must be at least 1, got 0"),
        (dict(temperature=0.5, kind="exact", max_draws=0), "max_draws and block must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        from_temperature(**options)
