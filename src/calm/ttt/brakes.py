"""Brakes: limits on the change of a prompt's weights, and conditions for undoing it.

Drift is measured at the prompt's state, between what the adapted and the base model would draw there, by the energy
coefficient (Szekely and Rizzo 2013, "Energy statistics"):

    drift = (2 E|x - y| - E|x - x'| - E|y - y'|) / (2 E|x - y|),    x, x' ~ adapted, y, y' ~ base

It lies between 0, only for equal distributions, and 1, and needs no likelihood.
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
    """Limits on the change of the weights; all off by default."""

    penalty: float = 0.0
    """reward subtracted per unit of drift"""
    max_drift: float | None = None
    """in (0, 1]; a step that would bring the drift above it is not taken, and adaptation stops"""
    max_norm: float | None = None
    """length of the longest change, relative to the weights changed; a longer one is shortened to it"""
    enough: float | None = None
    """mean reward of the futures at which no further step is taken"""
    max_loss: float | None = None
    """relative loss of fluency, such as .1, beyond which the standard text and the base weights are kept"""

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
        """Texts to be replaced by the standard ones, given the fluency of both (bits per byte, or an energy score)."""
        return np.zeros(len(standard), bool) if self.max_loss is None else aligned > (1 + self.max_loss) * standard


def drift(adapted: Float[Array, "S Z"], base: Float[Array, "S Z"]) -> Float[Array, ""]:
    """Energy coefficient of two samples drawn with the same noise.

    Pairs of the same noise are left out, between samples and within, so equal models give exactly 0; estimates may be
    slightly negative.
    """
    count = len(base)

    def mean_distance(a: Array, b: Array) -> Array:
        apart = distance(jnp.square(a[:, None] - b[None]).sum(-1), 1.0)
        return jnp.where(jnp.eye(count, dtype=bool), 0.0, apart).sum() / (count * (count - 1))

    between = 2 * mean_distance(adapted, base)
    energy = between - mean_distance(adapted, adapted) - mean_distance(base, base)
    return energy / jnp.maximum(between, 1e-6)
