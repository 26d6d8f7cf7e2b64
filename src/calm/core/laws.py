"""Effect of the samplers on a known distribution (law): targets, costs, and the batch sampler's law by enumeration. numpy only.

The reference for tests and for the tables of docs/sampling.md; `python -m benchmarks.samplers` prints those.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


def target(law: Float[np.ndarray, "X"], temperature: Fraction) -> Float[np.ndarray, "X"]:
    """P^(1/T) / Z."""
    powered = (law / law.max()) ** float(1 / temperature)
    return powered / powered.sum()


def expected_draws(law: Float[np.ndarray, "X"], temperature: Fraction) -> float:
    """Draws that the exact sampler uses on average: (n + [a > 0] sum P^(1/T - 1)) / sum P^(1/T), n = floor(1/T), a = 1/T - n.

    An attempt makes all of its n draws, also after the first that differs (CALM, arXiv:2510.27688, counts so as well).
    """
    power = 1 / temperature
    n = math.floor(power)
    law = law[law > 0]
    second = (law ** float(power - 1)).sum() if power > n else 0.0
    return float((n + second) / (law ** float(power)).sum())


def draws_by_collisions(collision_rate: float, temperature: Fraction) -> float:
    """`expected_draws` for equally likely chunks of that collision rate sum P^2; exact for every law at T = 1/2.

    The other powers of P cannot be read off a collision rate. For T between 1/2 and 1 it is a lower bound, and an upper bound
    for the costs of T = 1/3, 1/4 ... (both by Jensen's inequality).
    """
    if collision_rate <= 0:
        return math.inf
    power = 1 / temperature
    n = math.floor(power)
    support = 1 / collision_rate
    return n * support ** float(power - 1) + (support if power > n else 0.0)


class BatchLaw(NamedTuple):
    """Effect of the batch sampler on one distribution, temperature and number of candidates."""

    law: Float[np.ndarray, "X"]
    """probability of each outcome to be chosen"""
    fallback_share: float
    """probability that no count is above 1/T - 1"""


def batch_law(law: Float[np.ndarray, "X"], temperature: Fraction, num_candidates: int) -> BatchLaw:
    """The exact law of `BatchTemperature`, summed over all ways in which the draws can share out.

    For few outcomes, all of positive probability. Written apart from the sampler: weights come from products of ratios, not
    from a table of log-gammas.
    """
    counts = shares(num_candidates, len(law))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_candidates + 1)))])
    chance = np.full(len(counts), log_factorial[num_candidates])
    for count, probability in zip(counts.T, law, strict=True):
        chance += (np.arange(num_candidates + 1) * math.log(probability) - log_factorial)[count]
    chance = np.exp(chance)
    weight = binomials(num_candidates, temperature)[counts]
    fell_back = weight.sum(1) == 0
    even = counts == counts.max(1, keepdims=True)
    weight = np.where(fell_back[:, None], even, weight)
    chosen = weight / weight.sum(1, keepdims=True)
    return BatchLaw(chance @ chosen, float(chance @ fell_back))


def binomials(size: int, temperature: Fraction) -> Float[np.ndarray, "_"]:
    """C(c, 1/T) for c = 0 .. size, up to a common factor; 0 for c = 0 and where c <= 1/T - 1.

    C(c, b) / C(c - 1, b) = c / (c - b), so each is the one before times that.
    """
    power = 1 / temperature
    values = np.zeros(size + 1)
    for count in range(1, size + 1):
        if count > power - 1:
            before = values[count - 1]
            values[count] = before * float(count / (count - power)) if before else 1.0
    return values / values.max() if values.any() else values


def shares(total: int, outcomes: int) -> Int[np.ndarray, "R X"]:
    """All ways to share `total` draws among the outcomes."""
    columns: list[np.ndarray] = []
    left = np.array([total])
    for _ in range(outcomes - 1):  # each row so far, with every count from 0 to what it has left
        repeated = np.repeat(np.arange(left.size), left + 1)
        count = np.arange(repeated.size) - (np.cumsum(left + 1) - left - 1)[repeated]
        columns = [column[repeated] for column in columns] + [count]
        left = left[repeated] - count
    return np.stack([*columns, left], axis=1)


def total_variation(ours: Float[np.ndarray, "X"], theirs: Float[np.ndarray, "X"]) -> float:
    """Half the sum of absolute differences: the largest difference in the probability of any event."""
    return float(np.abs(ours - theirs).sum() / 2)
