"""The search: finds the least of a bowl, keeps to its bounds, is never worse than where it began."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from calm.evaluate.scalar_search import minimise_by_coordinates

LOW, HIGH = np.array([0.0, -1.0, 0.0]), np.array([1.0, 3.0, 10.0])
points = st.tuples(*[st.floats(float(low), float(high)) for low, high in zip(LOW, HIGH, strict=True)]).map(np.array)


@given(points, points)
def test_the_least_of_a_bowl_is_found(start, centre):
    found = minimise_by_coordinates(lambda x: float((((x - centre) / (HIGH - LOW)) ** 2).sum()), start, LOW, HIGH, sweeps=3)
    np.testing.assert_allclose((found - centre) / (HIGH - LOW), 0, atol=0.01)


@given(points, st.integers(0, 1000))
def test_it_keeps_to_its_bounds_and_is_never_worse_than_the_start(start, seed):
    slopes = np.random.default_rng(seed).normal(size=3)

    def rough(x: np.ndarray) -> float:
        assert (x >= LOW - 1e-12).all() and (x <= HIGH + 1e-12).all()
        return float(slopes @ x + np.sin(9 * x).sum())

    assert rough(minimise_by_coordinates(rough, start, LOW, HIGH)) <= rough(start)
