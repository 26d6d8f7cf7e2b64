"""Cross-entropy over a vocabulary that never holds all its logits.

At V = 8192 the logits of a small batch are 100 MB, written, read for the softmax, kept and read again. The fused form walks
over blocks of rows and computes loss and gradients of a block while its logits are in cache; nothing of size V is kept.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.dense import Precision, operand, product, product_with_transpose, weight_gradient

BLOCK_ROWS = 512


def plain_cross_entropy(hidden: Float[Array, "R D"], table: Float[Array, "V D"], targets: Int[Array, "R"]) -> Float[Array, "R"]:
    """-log softmax(hidden table^T)[target] in nats, one value a row: the reference."""
    logits = product_with_transpose(hidden, table)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def target_log_prob(
    hidden: Float[Array, "R D"], table: Float[Array, "V D"], targets: Int[Array, "R"], precision: Precision = "float32"
) -> Float[Array, "R"]:
    """log softmax(hidden table^T)[target] in nats, one value a row; so many rows at a time that their logits stay in cache."""
    rows = hidden.shape[0]
    size = min(rows, BLOCK_ROWS)
    padding = -rows % size
    blocks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1])
    columns = operand(table, precision)

    def block(pair: tuple[Array, Array]) -> Array:
        logits = product_with_transpose(operand(pair[0], precision), columns)
        chosen = jnp.take_along_axis(logits, pair[1][:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(block, (blocks, jnp.pad(targets, (0, padding)).reshape(-1, size))).reshape(-1)[:rows]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused_cross_entropy(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    precision: Precision = "float32",
    table_gradient: bool = True,
) -> Float[Array, ""]:
    """sum_r weights[r] * cross-entropy of row r, in nats.

    Reduced, unlike the other losses: the weights must be known in the forward pass, which already computes the gradients. They
    get no gradient themselves. `table_gradient` False skips the table's (a frozen table).
    """
    return _fused_forward(hidden, table, targets, weights, precision, table_gradient)[0]


def _fused_forward(
    hidden: Array, table: Array, targets: Array, weights: Array, precision: Precision, table_gradient: bool
) -> tuple[Array, tuple[Array, Array | None]]:
    (nats, _), gradients = loss_and_gradients(hidden, table, targets, weights, precision, table_gradient)
    return nats, gradients


def loss_and_gradients(
    hidden: Float[Array, "R D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "R"],
    weights: Float[Array, "R"],
    precision: Precision,
    table_gradient: bool,
    z_weight: float = 0.0,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Float[Array, "R D"], Float[Array, "V D"] | None]]:
    """Weighted sums of cross-entropy and of log^2 Z, and the gradients of cross-entropy + z_weight * log^2 Z by hidden and
    table; Z is the softmax's normaliser (`calm.token.z_loss`).
    """
    rows, dim = hidden.shape
    blocks = -(-rows // BLOCK_ROWS)
    padding = blocks * BLOCK_ROWS - rows

    def split(x: Array) -> Array:  # padded rows weigh nothing
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, BLOCK_ROWS, *x.shape[1:])

    table_operand = operand(table, precision)

    def body(carry: tuple[Array, Array, Array | None], block: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        total, squares, table_sum = carry
        h, target, weight = block
        h = operand(h, precision)
        logits = product_with_transpose(h, table_operand)
        high = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - high)
        normaliser = exponentials.sum(-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
        log_z = (high + jnp.log(normaliser))[:, 0]
        total = total + (weight * (log_z - chosen[:, 0])).sum()
        squares = squares + (weight * log_z**2).sum()
        # d loss / d logits = weight * ((1 + 2 z_weight log Z) softmax - onehot); the one-hot part is a gather and a scatter of
        # rows, done below
        scale = weight * (1 + 2 * z_weight * log_z) if z_weight else weight
        softmax = operand(exponentials * (scale[:, None] / normaliser), precision)
        h_gradient = product(softmax, table_operand)
        if table_sum is not None:
            table_sum = table_sum + weight_gradient(softmax, h)
        return (total, squares, table_sum), h_gradient

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(table.shape, jnp.float32) if table_gradient else None)
    (total, squares, table_sum), h_gradient = jax.lax.scan(body, carry, (split(hidden), split(targets), split(weights)))
    h_gradient = h_gradient.reshape(-1, dim)[:rows] - weights[:, None] * table[targets]
    if table_sum is not None:
        table_sum = table_sum.at[targets].add(-weights[:, None] * hidden)
    return (total, squares), (h_gradient, table_sum)


def _fused_backward(precision: Precision, table_gradient: bool, gradients: tuple[Array, Array | None], g: Array) -> tuple:
    h_gradient, table_sum = gradients
    return g * h_gradient, None if table_sum is None else g * table_sum, None, None


fused_cross_entropy.defvjp(_fused_forward, _fused_backward)
