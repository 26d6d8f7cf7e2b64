"""The softmax head: hidden state to a distribution over the vocabulary, which can be drawn from and scored exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.decoder import ARGMAX_GROUP, ARGMAX_ROWS, ScoringTable
from calm.core.dense import Dense, Precision, dense_flops, operand, product


class SoftmaxHead(nnx.Module):
    """Hidden states `[*b D]` to states of the table's width W, whose products with the table's rows are the logits.

    It has a map only where W differs from D, and a table of its own only where the embedding's is not shared.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        table_dim: int,
        *,
        tied: bool,
        init_std: float | None = None,
        precision: Precision = "float32",
        rngs: nnx.Rngs,
    ):
        sizes = dict(init_std=init_std, precision=precision, rngs=rngs)
        std = table_dim**-0.5 if init_std is None else init_std
        self.narrow = Dense(dim, table_dim, **sizes) if table_dim != dim else None
        own = None if tied else std * jax.random.normal(rngs.params(), (vocab_size, table_dim), jnp.float32)
        self.table = None if own is None else nnx.Param(own)

    def __call__(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b W"]:
        return hidden if self.narrow is None else self.narrow(hidden)

    @staticmethod
    def flops(vocab_size: int, dim: int, table_dim: int) -> int:
        """Forward FLOPs of the logits at one position."""
        return (dense_flops(dim, table_dim) if table_dim != dim else 0) + dense_flops(table_dim, vocab_size)


def draw_tokens(
    uniforms: Float[Array, "S *b 2"], states: Float[Array, "*b W"], scoring: ScoringTable, precision: Precision
) -> Int[Array, "S *b"]:
    """S tokens drawn from softmax(states . table) at every position, by two numbers uniform in [0, 1) for each.

    As `calm.core.decoder.draw_token`, which inverts the distribution function in two steps; here the S draws of a
    position share its logits, which are made once and never kept.
    """

    def block(states: Array, uniforms: Array) -> Array:
        logits = product(operand(states, precision), scoring.columns)
        return scoring.ids[draw_places(uniforms, jnp.exp(logits - logits.max(-1, keepdims=True)) * scoring.first)]

    rows = jnp.moveaxis(uniforms.reshape(uniforms.shape[0], -1, 2), 0, 1)
    drawn = by_row_blocks(block, states.reshape(-1, states.shape[-1]), rows)
    return drawn.T.reshape(uniforms.shape[:-1])


def draw_places(uniforms: Float[Array, "R S 2"], weights: Float[Array, "R X"]) -> Int[Array, "R S"]:
    """S places of every row, each drawn with probability weight / sum of weights; the weights need not add up to 1.

    The first number picks a group of places and the second the place within it, so that float32 resolves places of probability
    far below 2^-24.
    """
    padding = -weights.shape[1] % ARGMAX_GROUP
    groups = jnp.pad(weights, ((0, 0), (0, padding))).reshape(weights.shape[0], -1, ARGMAX_GROUP)
    group = _invert(groups.sum(-1)[:, None], uniforms[..., 0])
    within = jnp.take_along_axis(groups, group[:, :, None], axis=1)
    return group * ARGMAX_GROUP + _invert(within, uniforms[..., 1])


def _invert(weights: Float[Array, "R #S X"], uniforms: Float[Array, "R S"]) -> Int[Array, "R S"]:
    """The first place at which the running sum of the weights exceeds uniform * total."""
    total = jnp.cumsum(weights, axis=-1)
    above = (total > (uniforms * total[..., -1])[..., None]) & (weights > 0)
    # Rounding may leave no place above the target; then, and only then, the heaviest place stands in.
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))


def nats_and_match(
    states: Float[Array, "*b W"], table: Float[Array, "V W"], targets: Int[Array, "*b"], precision: Precision
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """-log p(target) in nats, and sum_x p(x)^2, at every position, with p = softmax(states . table).

    The second is how probable two independent draws are to match. A block of rows at a time, so no more logits exist at once.
    """
    columns = operand(table, precision).T

    def block(states: Array, targets: Array) -> Array:
        logits = product(operand(states, precision), columns)
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        nats = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        return jnp.stack([nats, jnp.exp(2 * log_p).sum(-1)], axis=-1)

    both = by_row_blocks(block, states.reshape(-1, states.shape[-1]), targets.reshape(-1))
    return both[:, 0].reshape(targets.shape), both[:, 1].reshape(targets.shape)


def by_row_blocks(function: Callable[..., Any], *rows: Array) -> Any:
    """`function(*rows)`, an array or a tuple of them, for so many rows at a time that their logits stay in cache."""
    count = rows[0].shape[0]
    if count <= ARGMAX_ROWS:
        return function(*rows)
    blocks = -(-count // ARGMAX_ROWS)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, blocks * ARGMAX_ROWS - count), *(((0, 0),) * (x.ndim - 1))))
        return padded.reshape(blocks, ARGMAX_ROWS, *x.shape[1:])

    results = jax.lax.map(lambda block: function(*block), tuple(map(split, rows)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)
