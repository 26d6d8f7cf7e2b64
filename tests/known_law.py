"""A source whose law is known, and the test that draws follow a law."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from calm.core import repetition
from calm.core.sampler import StepKeys

P = np.array([0.4, 0.3, 0.2, 0.1])


@dataclasses.dataclass(frozen=True)
class Known:
    """Outcome i comes with probability law[i], as the chunk (i, i + 100); the same law for every row."""

    law: np.ndarray
    alive: Bool[Array, "B"]
    history: np.ndarray | None = None

    def draw(self, keys, num_draws):
        logits = jnp.log(jnp.asarray(self.law))
        drawn = jax.vmap(lambda key: jax.random.categorical(key, logits, shape=(num_draws,)), out_axes=1)(keys)
        return jnp.stack([drawn, drawn + 100], axis=-1).astype(jnp.int32)

    def repeats(self, chunks, length):
        history = jnp.broadcast_to(jnp.asarray(self.history, jnp.int32), (chunks.shape[1], len(self.history)))
        return repetition.repeats(history, chunks, length)


def sample(sampler, law=P, rows=10_000, seed=1, history=None):
    """The sampler's choices for so many independent rows; outcomes as numbers."""
    both = jax.random.split(jax.random.key(seed), (2, rows))

    @jax.jit
    def choose(keys):
        return sampler.sample(keys, Known(law, jnp.ones((rows,), bool), history))

    choice = choose(StepKeys(both[0], both[1]))
    return np.asarray(choice.chunk[:, 0]), choice


def chi_square(chosen, expected) -> float:
    """Distance in standard deviations of chi-square above its mean; an outcome of probability 0 must not occur."""
    counts = np.bincount(chosen, minlength=len(expected))
    possible = expected > 0
    assert counts.sum() == counts[possible].sum(), counts
    want = counts.sum() * expected[possible]
    freedom = max(possible.sum() - 1, 1)
    return (((counts[possible] - want) ** 2 / want).sum() - freedom) / np.sqrt(2 * freedom)
