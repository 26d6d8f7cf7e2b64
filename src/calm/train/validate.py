"""The objective on held-out text: what checkpoints of a run are best compared by, whatever the objective's terms are."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from calm.rng import PRNGKey
from calm.train.protocol import Measured

TOKENS_PER_BATCH = 4096


def validator(objective: Any, blocks: Int[np.ndarray, "R T"], key: PRNGKey, step: int) -> Callable[[Any], dict[str, Measured]]:
    """A function from trained weights to the means of the loss (`objective`) and of its terms over `blocks`.

    Every call draws the same noise, so that a difference between checkpoints is not one of luck; the weights of the terms are
    those of `step`, the run's last, whatever they were when the checkpoint was made.
    """
    rows = max(1, min(len(blocks), TOKENS_PER_BATCH // blocks.shape[1]))
    loss = jax.jit(objective.loss)

    def validate(params: Any) -> dict[str, Measured]:
        sums: dict[str, np.ndarray] = {}
        for start in range(0, len(blocks), rows):
            batch = blocks[start : start + rows].astype(np.int32)
            value, terms = loss(params, objective.frozen, batch, jax.random.fold_in(key, start), step)
            for name, term in {"objective": value, **terms}.items():
                sums[name] = sums.get(name, np.float64(0)) + len(batch) * np.asarray(term, np.float64)
        return {name: (total / len(blocks)).tolist() for name, total in sums.items()}

    return validate
