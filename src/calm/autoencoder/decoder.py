"""A latent to K hidden states, and hidden states to tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.autoencoder.encoder import apply_layers
from calm.nn.dense import Dense, Precision, operand, product_with_transpose
from calm.nn.mlp import ResidualSwiGLU
from calm.nn.stack import Stack

ARGMAX_ROWS = 400  # rows of logits that stay in cache at V = 8192
ARGMAX_GROUP = 64  # columns a vector unit reduces at a time


class Decoder(nnx.Module):
    """Z -> D, chunk layers, D -> K*D, token layers at each of the K places, norm: the encoder's mirror (CALM section 3.1)."""

    def __init__(
        self,
        *,
        chunk_size: int,
        latent_dim: int,
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
        self.chunk_size = chunk_size

    def __call__(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        hidden = apply_layers(self.chunk_layers, self.from_latent(latents))
        hidden = self.expand(hidden)
        hidden = hidden.reshape(*hidden.shape[:-1], self.chunk_size, -1)
        return self.norm(apply_layers(self.token_layers, hidden))


def best_token(states: Float[Array, "*b D"], table: Float[Array, "V D"], precision: Precision) -> Int[Array, "*b"]:
    """argmax over v of states . table[v], ties to the lowest id; equal to `jnp.argmax` of the logits, without keeping them.

    Rows go in blocks whose logits stay in cache, and each argmax takes two steps: the maximum of every group of columns, which
    vectorises, then the place within the winning group. One argmax over a whole row walks it element by element on CPU.
    """
    rows, vocab_size = states.reshape(-1, states.shape[-1]), table.shape[0]
    num_rows = rows.shape[0]
    padded_vocab = -(-vocab_size // ARGMAX_GROUP) * ARGMAX_GROUP
    table = operand(jnp.pad(table, ((0, padded_vocab - vocab_size), (0, 0))), precision)

    def block(rows: Array) -> Array:
        logits = product_with_transpose(operand(rows, precision), table)
        if padded_vocab > vocab_size:
            logits = jnp.where(jnp.arange(padded_vocab) < vocab_size, logits, -jnp.inf)
        groups = logits.reshape(rows.shape[0], -1, ARGMAX_GROUP)
        winner = jnp.argmax(groups.max(-1), axis=-1)
        within = jnp.take_along_axis(groups, winner[:, None, None], axis=1)[:, 0]
        return (winner * ARGMAX_GROUP + jnp.argmax(within, axis=-1)).astype(jnp.int32)

    if num_rows <= ARGMAX_ROWS:
        return block(rows).reshape(states.shape[:-1])
    blocks = -(-num_rows // ARGMAX_ROWS)
    rows = jnp.pad(rows, ((0, blocks * ARGMAX_ROWS - num_rows), (0, 0))).reshape(blocks, ARGMAX_ROWS, -1)
    return jax.lax.map(block, rows).reshape(-1)[:num_rows].reshape(states.shape[:-1])
