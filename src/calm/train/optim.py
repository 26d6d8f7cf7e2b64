"""AdamW as the paper trains with it, and the learning rate over the steps.

Source: CALM, arXiv:2510.27688: AdamW(0.9, 0.95), weight decay 0.1, clipping at 1.0, learning rate 3e-4 constant
after 1000 (autoencoder) or 2000 (language model) steps of warm-up.

Decayed are matrices, embedding tables among them (as in the paper's trainer; the autoencoder's table is its output matrix too);
not decayed are biases, gains of norms, and per-channel parameters of recurrences. The choice is made by name and not by the
number of axes alone, since stacked layers give a bias a second axis.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from calm.config import FrozenDict
from calm.errors import UsageError
from calm.train.trees import map_named

Schedule = Callable[[ArrayLike], Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping by global norm, linear warm-up, then constant or cosine."""

    learning_rate: float = 3e-4
    """peak learning rate"""
    warmup_steps: int = 1000
    """linear from 1/warmup_steps of the peak at step 0; 0 = none"""
    schedule: Literal["constant", "cosine"] = "constant"
    """what follows the warm-up"""
    final_fraction: float = 0.1
    """where the cosine ends, as a fraction of the peak"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the first and second moment"""
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """per step, times the learning rate"""
    no_decay: str = r"(^|\.)(bias|scale|gain|skip|(.*_)?log(_.*)?)$"
    """regular expression: parameters whose name it finds are not decayed, nor are those with fewer than two axes"""
    clip_norm: float = 1.0
    """largest global norm of a gradient; 0 = no clipping"""
    factors: dict[str, float] = dataclasses.field(default_factory=FrozenDict)
    """factors of the learning rate of the parameters whose name a regular expression finds, the first that does: a backbone may
    want a tenth of the rate of a token table"""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"optimizer: learning_rate must be above 0, got {self.learning_rate}")
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise UsageError("optimizer: warmup_steps, clip_norm and weight_decay cannot be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optimizer: betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.final_fraction <= 1:
            raise UsageError(f"optimizer: final_fraction must lie in [0, 1], got {self.final_fraction}")
        object.__setattr__(self, "factors", FrozenDict(self.factors))
        for name, pattern in (("no_decay", self.no_decay), *(("factors", pattern) for pattern in self.factors)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"optimizer: {name} is not a regular expression: {error}") from error
        if any(not factor >= 0 for factor in self.factors.values()):
            raise UsageError(f"optimizer: factors cannot be negative, got {dict(self.factors)}")

    def build_schedule(self, total_steps: int) -> Schedule:
        """The learning rate of the update that leads from `step` to `step + 1`."""

        def learning_rate(step: ArrayLike) -> Float[Array, ""]:
            step = jnp.asarray(step, jnp.float32)
            rate = jnp.float32(self.learning_rate)
            if self.schedule == "cosine":
                decay_steps = max(total_steps - self.warmup_steps, 1)
                progress = jnp.clip((step - self.warmup_steps) / decay_steps, 0.0, 1.0)
                rate *= self.final_fraction + (1 - self.final_fraction) * (1 + jnp.cos(jnp.pi * progress)) / 2
            if self.warmup_steps:
                rate *= jnp.minimum((step + 1) / self.warmup_steps, 1.0)
            return rate

        return learning_rate

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """Clipping, then AdamW, for a run of `total_steps` (which only the cosine needs)."""
        adamw = optax.adamw(
            self.build_schedule(total_steps),
            *self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=self.decayed,
        )
        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts += [adamw, *([optax.stateless(lambda updates, _: self._scaled(updates))] if self.factors else [])]
        return optax.chain(*parts) if len(parts) > 1 else adamw

    def factor(self, name: str) -> float:
        """Factor of the learning rate of a parameter, by its dotted name."""
        return next((factor for pattern, factor in self.factors.items() if re.search(pattern, name)), 1.0)

    def _scaled(self, updates: Any) -> Any:
        return map_named(lambda name, leaf: self.factor(name) * leaf, updates)

    def decayed(self, params: Any) -> Any:
        """Which leaves of `params` are decayed: the same tree of booleans."""
        return map_named(lambda name, leaf: leaf.ndim >= 2 and not re.search(self.no_decay, name), params)
