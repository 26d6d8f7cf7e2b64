"""Accuracy against collision: what a sampler gains in likely chunks, and what it loses in different ones.

The picture by which CALM (arXiv:2510.27688) compares temperatures and numbers of candidates. At a position of real text,
accuracy is the probability that the chunk chosen is the true one, and the collision rate that two independent choices agree.
Brier = 2 accuracy - collision rate. Lower temperatures move a model up and to the right; a better model, or a better sampler,
is higher at the same collision rate.
"""

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.counts import tally
from calm.core.temperature import falls_back, log_weights


def frontier(
    pools: Int[Array, "2 S K"], truth: Int[Array, "K"], temperatures: Sequence[Fraction], sizes: Sequence[int]
) -> Float[Array, "X A F"]:
    """The batch sampler at one position, for X temperatures and A numbers of candidates, from the same draws.

    Args:
        pools: two independent sets of S draws; a sampler of fewer candidates takes the first ones.
        truth: the chunk that stands in the text.
    Returns:
        F = 2 K + 1 numbers: accuracy of the first 1..K tokens, their collision rates, and the share of fallbacks. They are
        expectations over the sampler's choice given the draws, not single choices: unbiased, and less noisy.
    """
    width = truth.shape[0]
    right = jnp.cumprod(pools == truth, axis=-1).astype(jnp.float32)  # [2 S K]: the first n tokens are those of the text
    alike = jnp.cumprod(pools[0][:, None] == pools[1][None], axis=-1).astype(jnp.float32)  # [S S K]
    found = []
    for size in sizes:
        counts = jax.vmap(tally)(pools[:, :size])
        for temperature in temperatures:
            weights = jax.nn.softmax(log_weights(counts, temperature, size), axis=-1)
            accuracy = jnp.einsum("ps,psk->k", weights, right[:, :size]) / 2
            collision = jnp.einsum("s,t,stk->k", weights[0], weights[1], alike[:size, :size])
            fallback = falls_back(counts, temperature).mean(dtype=jnp.float32)
            found.append(jnp.concatenate([accuracy, collision, fallback[None]]))
    return jnp.stack(found).reshape(len(sizes), len(temperatures), 2 * width + 1).swapaxes(0, 1)
