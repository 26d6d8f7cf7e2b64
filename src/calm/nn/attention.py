"""Causal grouped-query attention with a key-value state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.nn.dense import Dense, Precision, dense_flops, operand
from calm.nn.rotary import rotate


class AttentionState(NamedTuple):
    """Keys and values of the positions read so far, preallocated to the context P.

    Heads stand before positions, as the products want them: the other order would be transposed at every step.
    """

    keys: Float[Array, "B G P C"]
    values: Float[Array, "B G P C"]


class Window(NamedTuple):
    """Where a block of positions stands in its sequence.

    `offset` positions came before the block. Row b begins at `starts[b]`: positions before it are left padding, never
    attended to, and rotary positions count from it, so a padded row computes what it would compute alone.
    """

    offset: Int[Array, ""]
    starts: Int[Array, "B"]

    def positions(self, length: int) -> Int[Array, "B N"]:
        return self.offset + jnp.arange(length)[None, :] - self.starts[:, None]

    def mask(self, length: int, context: int) -> Bool[Array, "B 1 N P"]:
        """Query i of the block may see key j: from the start of its row, and not from the future."""
        keys = jnp.arange(context)[None, None, :]
        queries = self.offset + jnp.arange(length)[None, :, None]
        return ((keys <= queries) & (keys >= self.starts[:, None, None]))[:, None]


class CausalAttention(nnx.Module):
    """Multi-head attention to the past, H query heads over G key-value heads (Ainslie et al. 2023, arXiv:2305.13245).

    `qkv` holds the columns of the H query heads, then of the G key heads, then of the G value heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        rope_theta: float = 10_000.0,
        init_std: float | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.rope_theta, self.precision = rope_theta, precision
        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = Dense(dim, width, init_std=init_std, precision=precision, rngs=rngs)
        self.out = Dense(num_heads * self.head_dim, dim, init_std=init_std, precision=precision, rngs=rngs)

    def init_state(self, batch: int, context: int) -> AttentionState:
        # On CPU a bfloat16 state is rewritten as a whole at every step and widened again for the products: it is kept in
        # float32, holding rounded values.
        dtype = jnp.bfloat16 if self.precision == "bfloat16" and jax.default_backend() != "cpu" else jnp.float32
        zeros = jnp.zeros((batch, self.num_kv_heads, context, self.head_dim), dtype)
        return AttentionState(zeros, zeros)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: AttentionState | None, window: Window
    ) -> tuple[Float[Array, "B N D"], AttentionState | None]:
        """Without a state the block is the whole sequence; with one, the block continues what the state has read."""
        batch, length, _ = hidden.shape
        heads = self.qkv(hidden).reshape(batch, length, -1, self.head_dim)
        query, key, value = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        positions = window.positions(length)
        query = operand(rotate(query, positions, self.rope_theta), self.precision)
        key = operand(rotate(key, positions, self.rope_theta), self.precision)
        value = operand(value, self.precision)
        if state is not None:
            at = (0, 0, window.offset, 0)
            state = AttentionState(
                jax.lax.dynamic_update_slice(state.keys, key.swapaxes(1, 2).astype(state.keys.dtype), at),
                jax.lax.dynamic_update_slice(state.values, value.swapaxes(1, 2).astype(state.values.dtype), at),
            )
            query, key, value = query.astype(state.keys.dtype), state.keys.swapaxes(1, 2), state.values.swapaxes(1, 2)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=window.mask(length, key.shape[1]))
        return self.out(mixed.astype(jnp.float32).reshape(batch, length, -1)), state

    @staticmethod
    def flops(dim: int, num_heads: int, num_kv_heads: int, context: int) -> int:
        """Forward FLOPs of one position that attends to `context` positions (masked ones are computed and counted)."""
        kv_dim = dim // num_heads * num_kv_heads
        return dense_flops(dim, dim + 2 * kv_dim) + 4 * context * dim + dense_flops(dim, dim)
