"""The z-loss: a small weight on log^2 Z, where Z is the normaliser of the softmax, beside the cross-entropy.

Cross-entropy does not know where the logits stand: adding a number to all of a row's changes nothing, so nothing keeps them
from drifting to where floating point is coarse. log^2 Z pulls log Z to 0, and the logits towards log-probabilities. PaLM
(Chowdhery et al. 2022, arXiv:2204.02311) uses 1e-4 on the output softmax; ST-MoE (Zoph et al. 2022, arXiv:2202.08906) on its
router.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.cross_entropy import loss_and_gradients
from calm.core.dense import Precision, product_with_transpose


def plain_z_loss(hidden: Float[Array, "R D"], table: Float[Array, "V D"]) -> Float[Array, "R"]:
    """log^2 of the sum of exp(hidden table^T) over the vocabulary, one value a row: the reference."""
    return jax.nn.logsumexp(product_with_transpose(hidden, table), axis=-1) ** 2


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused_z_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    z_weight: float,
    precision: Precision = "float32",
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(cross-entropy + z_weight * log^2 Z, cross-entropy, log^2 Z), each a sum over rows with these weights, in one pass over
    the logits. As `calm.losses.fused_cross_entropy`; only the first of the three has a gradient, the others are to be logged.
    """
    return _forward(hidden, table, targets, weights, z_weight, precision)[0]


def _forward(
    hidden: Array, table: Array, targets: Array, weights: Array, z_weight: float, precision: Precision
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array | None]]:
    (nats, squares), gradients = loss_and_gradients(hidden, table, targets, weights, precision, True, z_weight)
    return (nats + jnp.float32(z_weight) * squares, nats, squares), gradients


def _backward(
    z_weight: float, precision: Precision, gradients: tuple[Array, Array | None], g: tuple[Array, Array, Array]
) -> tuple:
    h_gradient, table_sum = gradients
    return g[0] * h_gradient, None if table_sum is None else g[0] * table_sum, None, None


fused_z_cross_entropy.defvjp(_forward, _backward)
