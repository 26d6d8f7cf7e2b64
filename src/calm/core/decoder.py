"""A latent to K hidden states, and hidden states to tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Dense, Precision, operand, product
from calm.core.encoder import apply_layers
from calm.core.mlp import ResidualSwiGLU
from calm.core.posterior import POSTERIORS, PosteriorKind
from calm.core.stack import Stack

ARGMAX_ROWS = 400  # rows of logits that stay in cache at V = 8192
ARGMAX_GROUP = 64  # columns a vector unit reduces at a time


class Decoder(nnx.Module):
    """Z -> D, chunk layers, D -> K*D, token layers at each of the K places, norm: the encoder's mirror (CALM).

    A vector is first brought to where latents lie. Nothing keeps a language model's samples on a sphere, and nothing has to:
    the energy score is proper in all of R^Z. But the decoder has seen no other radius, and the radius says nothing.
    """

    def __init__(
        self,
        *,
        chunk_size: int,
        latent_dim: int,
        posterior: PosteriorKind,
        dim: int,
        inner_dim: int,
        layers_per_stage: int,
        init_std: float | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        def layer(rngs: nnx.Rngs) -> ResidualSwiGLU:
            return ResidualSwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

        def dense(in_dim: int, out_dim: int) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=init_std, precision=precision, rngs=rngs)

        self.from_latent = dense(latent_dim, dim)
        self.chunk_layers = Stack(layer, layers_per_stage, rngs=rngs)
        self.expand = dense(dim, chunk_size * dim)
        self.token_layers = Stack(layer, layers_per_stage, rngs=rngs)
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.chunk_size, self.posterior = chunk_size, posterior

    def __call__(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        hidden = apply_layers(self.chunk_layers, self.from_latent(POSTERIORS[self.posterior].onto(latents)))
        hidden = self.expand(hidden)
        hidden = hidden.reshape(*hidden.shape[:-1], self.chunk_size, -1)
        return self.norm(apply_layers(self.token_layers, hidden))


class ScoringTable(NamedTuple):
    """The table as the right operand of its product, without the banned tokens: a loop makes it once, in front.

    Columns that fill up the last group repeat earlier ones, so nothing has to be masked: whichever copy wins, `ids` names the
    token. (Masking logits copies them; and with few rows the product against the table as it is takes three times as long.)
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

    return by_blocks(block, states.reshape(-1, states.shape[-1])).reshape(states.shape[:-1])


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

    return by_blocks(block, states.reshape(-1, states.shape[-1]), uniforms.reshape(-1, 2)).reshape(states.shape[:-1])


def by_blocks(function: Callable[..., Array], *rows: Array) -> Array:
    """`function(*rows)`, for so many rows at a time that their logits stay in cache."""
    num_rows = rows[0].shape[0]
    if num_rows <= ARGMAX_ROWS:
        return function(*rows)
    blocks = -(-num_rows // ARGMAX_ROWS)

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, blocks * ARGMAX_ROWS - num_rows), (0, 0))).reshape(blocks, ARGMAX_ROWS, -1)

    return jax.lax.map(lambda block: function(*block), tuple(map(split, rows))).reshape(-1)[:num_rows]
