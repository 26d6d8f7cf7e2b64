"""Whether a token model has collapsed, in numbers: its hidden states into few directions, its predictions into one, its logits
into sizes that nothing holds.

Each is measured on held-out text, so that "collapse" is a reading and not an impression:

    effective rank  of the hidden states' covariance (`calm.evaluate.inspection`): D for a round cloud, 1 for a line
    alignment       mean cosine of two hidden states of unrelated positions: 0 for directions all around, 1 for one direction
    information     entropy of the mean prediction minus the mean entropy of the predictions, in nats: what the predictions say
                    about where they are made; 0 when the model answers the same everywhere
    log Z           root mean square of the softmax's log normaliser, which cross-entropy leaves free (`calm.token.z_loss`)
    logit spread    standard deviation of a position's logits, a mean over positions: how large they have grown
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.evaluate.blocks import run_blocks
from calm.evaluate.inspection import covariance, effective_rank
from calm.token.model import TokenLM


class _Sums(NamedTuple):
    """Measures of one block, over its positions."""

    hidden: Float[Array, "*b D"]
    products: Float[Array, "*b D D"]
    direction: Float[Array, "*b D"]
    prediction: Float[Array, "*b V"]
    numbers: Float[Array, "*b 3"]
    """entropy of the predictions, log^2 Z, spread of the logits"""


@partial(jax.jit, static_argnames=("graph",))
def _block_sums(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> _Sums:
    lm: TokenLM = nnx.merge(graph, params)

    def block(hidden: Float[Array, "N D"]) -> _Sums:  # one at a time: the logits of several would be large
        logits = lm.logits(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        p = jnp.exp(logits - log_z[:, None])
        entropy = log_z - (p * logits).sum(-1)
        numbers = jnp.stack([entropy.sum(), (log_z**2).sum(), logits.std(-1).sum()])
        unit = hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True).clip(1e-12)
        products = jnp.einsum("nd,ne->de", hidden, hidden, precision=jax.lax.Precision.HIGHEST)
        return _Sums(hidden.sum(0), products, unit.sum(0), p.sum(0), numbers)

    return jax.lax.map(block, lm.hidden(tokens[:, :, None])[0])


def collapse_measures(lm: TokenLM, blocks: Int[np.ndarray, "R T"], *, batch_size: int | None = None) -> dict[str, float]:
    """The measures of the module, over every position of the blocks."""
    graph, params = nnx.split(lm)
    sums, _ = run_blocks(lambda tokens, rows: _block_sums(graph, params, tokens), blocks, batch_size)
    hidden, products, direction, prediction, numbers = (np.asarray(part, np.float64).sum(0) for part in sums)
    count = blocks.size
    entropy, squares, spread = numbers / count
    mean = prediction / prediction.sum()
    of_mean = -np.sum(mean * np.log(np.maximum(mean, 1e-300)))
    # The sum over pairs of different positions; a position's cosine with itself is 1.
    alignment = (np.sum(direction**2) - count) / (count * (count - 1))
    return {
        "effective_rank": effective_rank(covariance(hidden, products, count)),
        "alignment": float(alignment),
        "information": float(of_mean - entropy),
        "log_z": float(np.sqrt(squares)),
        "logit_spread": float(spread),
    }
