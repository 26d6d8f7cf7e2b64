"""Scoring hidden states against a vocabulary without keeping the logits: the best token, and a token drawn from the softmax.

V vocabulary · D width of states and table · R rows
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Precision, operand, product

ARGMAX_ROWS = 400  # rows of logits that stay in cache at V = 8192
ARGMAX_GROUP = 64  # columns a vector unit reduces at a time


class ScoringTable(NamedTuple):
    """A token table as the right operand of its product, without the banned tokens; loops make it once, before they start.

    Columns that fill the last group repeat earlier ones, so nothing has to be masked: whichever copy wins, `ids` names the
    token. (Masking would copy the logits; and with few rows a product with the untransposed table takes three times as long.)
    """

    columns: Float[Array, "D W"]
    ids: Int[Array, "W"]
    first: Bool[Array, "W"]
    """false for a repeated column"""

    @staticmethod
    def of(table: Float[Array, "V D"], precision: Precision, allowed: Int[Array, "X"] | None = None) -> "ScoringTable":
        """`allowed` are the ids that are not banned, ascending; none = all."""
        ids = jnp.arange(table.shape[0], dtype=jnp.int32) if allowed is None else allowed
        count, width = ids.shape[0], -(-ids.shape[0] // ARGMAX_GROUP) * ARGMAX_GROUP
        if allowed is not None or width > count:
            ids = jnp.resize(ids, (width,))
            table = table[ids]
        return ScoringTable(operand(table, precision).T, ids, jnp.arange(width) < count)


def best_token(
    states: Float[Array, "*b D"], table: Float[Array, "V D"] | ScoringTable, precision: Precision
) -> Int[Array, "*b"]:
    """argmax over v of states . table[v], ties to the lowest id; equal to `jnp.argmax` of the logits, without keeping them.

    Rows go in blocks whose logits stay in cache, and each argmax takes two steps: the maximum of every group of columns, which
    vectorises, then the place within the winning group. One argmax over a whole row walks it element by element on CPU.
    """
    scoring = table if isinstance(table, ScoringTable) else ScoringTable.of(table, precision)

    def block(states: Array) -> Array:
        groups = product(operand(states, precision), scoring.columns).reshape(states.shape[0], -1, ARGMAX_GROUP)
        winner = jnp.argmax(groups.max(-1), axis=-1)
        within = jnp.take_along_axis(groups, winner[:, None, None], axis=1)[:, 0]
        return scoring.ids[winner * ARGMAX_GROUP + jnp.argmax(within, axis=-1)]

    return by_row_blocks(block, states.reshape(-1, states.shape[-1])).reshape(states.shape[:-1])


def draw_token(
    uniforms: Float[Array, "*b 2"],
    states: Float[Array, "*b D"],
    table: Float[Array, "V D"] | ScoringTable,
    precision: Precision,
) -> Int[Array, "*b"]:
    """A token drawn from softmax(states . table), by two numbers uniform in [0, 1) for each.

    Inverts the distribution function: the first number picks a group of columns, the second the place within it. Gumbel noise
    would need a random number for every token of the vocabulary.
    """
    scoring = table if isinstance(table, ScoringTable) else ScoringTable.of(table, precision)

    def invert(weights: Array, uniform: Array) -> Array:
        total = jnp.cumsum(weights, axis=-1)
        above = (total > (uniform * total[:, -1])[:, None]) & (weights > 0)
        # Rounding may leave no place above the target; then, and only then, the heaviest place stands in.
        return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))

    def block(states: Array, uniforms: Array) -> Array:
        logits = product(operand(states, precision), scoring.columns)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True)) * scoring.first
        groups = weights.reshape(states.shape[0], -1, ARGMAX_GROUP)
        group = invert(groups.sum(-1), uniforms[:, 0])
        within = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
        return scoring.ids[group * ARGMAX_GROUP + invert(within, uniforms[:, 1])]

    return by_row_blocks(block, states.reshape(-1, states.shape[-1]), uniforms.reshape(-1, 2)).reshape(states.shape[:-1])


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
