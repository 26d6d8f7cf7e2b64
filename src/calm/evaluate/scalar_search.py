"""Least of a function of a few bounded numbers, without derivatives: one number at a time, by golden sections."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

GOLDEN = (5**0.5 - 1) / 2


def minimise_by_coordinates(
    loss: Callable[[Float[np.ndarray, "F"]], float],
    start: Float[np.ndarray, "F"],
    low: Float[np.ndarray, "F"],
    high: Float[np.ndarray, "F"],
    *,
    sweeps: int = 4,
    sections: int = 10,
) -> Float[np.ndarray, "F"]:
    """The best point met: `sweeps` times over all numbers, `sections` golden sections of the range of each.

    Never worse than `start`. Later sweeps look at an ever smaller part of the range around the point reached.
    """
    best = np.clip(start, low, high).astype(np.float64)
    least = loss(best)
    for sweep in range(sweeps):
        for place in range(len(best)):
            reach = (high[place] - low[place]) * 0.5**sweep
            left, right = max(low[place], best[place] - reach), min(high[place], best[place] + reach)
            value, there = _golden(partial(_along, loss, best, place), left, right, sections)
            if there < least:
                least, best = there, _with(best, place, value)
    return best


def _with(point: Float[np.ndarray, "F"], place: int, value: float) -> Float[np.ndarray, "F"]:
    moved = point.copy()
    moved[place] = value
    return moved


def _along(loss: Callable[[np.ndarray], float], point: Float[np.ndarray, "F"], place: int, value: float) -> float:
    return loss(_with(point, place, value))


def _golden(loss: Callable[[float], float], left: float, right: float, sections: int) -> tuple[float, float]:
    """The lower of the two inner points after `sections` sections, and its loss."""
    first, second = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    below, above = loss(first), loss(second)
    for _ in range(sections):
        if below <= above:
            right, second, above = second, first, below
            first = right - GOLDEN * (right - left)
            below = loss(first)
        else:
            left, first, below = first, second, above
            second = left + GOLDEN * (right - left)
            above = loss(second)
    return (first, below) if below <= above else (second, above)
