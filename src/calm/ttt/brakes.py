"""Brakes: how far a prompt's weights may go, and when they go back.

Drift is measured at the prompt's state, between what the adapted and the base model would draw there, by the energy
coefficient (Szekely and Rizzo 2013, "Energy statistics"):

    drift = (2 E|x - y| - E|x - x'| - E|y - y'|) / (2 E|x - y|),    x, x' ~ adapted, y, y' ~ base

It lies between 0, which it is for equal laws alone, and 1, and needs no likelihood.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from calm.core.energy_score import distance
from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brakes:
    """What holds the weights back; all off by default."""

    penalty: float = 0.0
    """what a unit of drift takes off the reward"""
    max_drift: float | None = None
    """a step that would bring the drift above this is not taken, and the weights stay where they are; in (0, 1]"""
    max_norm: float | None = None
    """longest change, in lengths of the weights that it is about; a longer one is shortened to it"""
    enough: float | None = None
    """mean reward of the futures at which no further step is taken"""
    max_loss: float | None = None
    """how much worse than the standard text the aligned one may read, .1 being a tenth; beyond it the standard text, and the
    base weights, are what remains"""

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and math.isfinite(self.penalty)):
            raise UsageError(f"brakes: penalty must be a number of at least 0, got {self.penalty}")
        if self.max_drift is not None and not 0 < self.max_drift <= 1:
            raise UsageError(f"brakes: max_drift must lie in (0, 1], got {self.max_drift}")
        for name in ("max_norm", "max_loss"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"brakes: {name} must be a number above 0, got {value}")
        if self.enough is not None and math.isnan(self.enough):
            raise UsageError("brakes: enough must be a number")

    def reads_too_badly(self, aligned: Float[np.ndarray, "B"], standard: Float[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
        """Which texts give way to the standard ones, by how badly either reads (bits per byte, or an energy score)."""
        return np.zeros(len(standard), bool) if self.max_loss is None else aligned > (1 + self.max_loss) * standard


def drift(adapted: Float[Array, "S Z"], base: Float[Array, "S Z"]) -> Float[Array, ""]:
    """The energy coefficient of two samples made of the same noise.

    Pairs of one noise are left out, between the samples as within them, so equal models give exactly 0; a little below 0 is
    noise of the estimate.
    """
    count = len(base)

    def mean_distance(a: Array, b: Array) -> Array:
        apart = distance(jnp.square(a[:, None] - b[None]).sum(-1), 1.0)
        return jnp.where(jnp.eye(count, dtype=bool), 0.0, apart).sum() / (count * (count - 1))

    between = 2 * mean_distance(adapted, base)
    energy = between - mean_distance(adapted, adapted) - mean_distance(base, base)
    return energy / jnp.maximum(between, 1e-6)
