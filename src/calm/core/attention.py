"""Causal grouped-query attention with a key-value state."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, operand
from calm.core.mixer import Fork, LayerInputs, MixerConfig, Window
from calm.core.rotary import rotate
from calm.errors import UsageError


class AttentionState(NamedTuple):
    """Keys and values of the positions read so far, preallocated to the context P.

    Heads stand before positions, as the products want them: the other order would be transposed at every step.
    """

    keys: Float[Array, "B G P C"]
    values: Float[Array, "B G P C"]


class BranchKeys(NamedTuple):
    """Keys and values of the positions that each of R branches has read of its own, preallocated to X of them."""

    keys: Float[Array, "B G R X C"]
    values: Float[Array, "B G R X C"]


class ForkedState(NamedTuple):
    """A sequence that was read, its trunk, and the branches that continue it from any of its positions.

    The trunk is shared: S continuations of each of N positions hold S N short states beside one long one.
    """

    trunk: AttentionState
    own: BranchKeys


@MixerConfig.register("A")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Sizes of the attention."""

    num_heads: int = 4
    num_kv_heads: int = 4
    rope_theta: float = 10_000.0
    init_std: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads) < 1:
            raise UsageError("attention: num_heads and num_kv_heads must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"attention: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "CausalAttention":
        return CausalAttention(dim, **dataclasses.asdict(self), precision=precision, rngs=rngs)

    def parameters(self, dim: int) -> int:
        return 2 * dim * (dim + dim // self.num_heads * self.num_kv_heads)

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position that attends to `context` positions (masked ones are computed and counted)."""
        return 2 * self.parameters(dim) + 4 * context * dim


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

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> AttentionState:
        """Keys and values yet to be written; rewindable by nature."""
        # On CPU a bfloat16 state is rewritten as a whole at every step and widened again for the products: it is kept in
        # float32, holding rounded values.
        dtype = jnp.bfloat16 if self.precision == "bfloat16" and jax.default_backend() != "cpu" else jnp.float32
        zeros = jnp.zeros((batch, self.num_kv_heads, context, self.head_dim), dtype)
        return AttentionState(zeros, zeros)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: AttentionState | ForkedState | None, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], AttentionState | ForkedState | None]:
        """Without a state the block is the whole sequence; with one, the block continues what the state has read. With a forked
        state its positions are the next ones of as many branches.
        """
        batch, length, _ = hidden.shape
        heads = self.qkv(hidden).reshape(batch, length, -1, self.head_dim)
        query, key, value = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        positions = window.positions(length)
        query = operand(rotate(query, positions, self.rope_theta), self.precision)
        key = operand(rotate(key, positions, self.rope_theta), self.precision)
        value = operand(value, self.precision)
        if isinstance(state, ForkedState):
            assert isinstance(window, Fork)
            mixed, state = _branch_attention(query, key, value, state, window)
            return self.out(mixed.reshape(batch, length, -1)), state
        assert isinstance(window, Window)
        if state is not None:
            at = (0, 0, window.offset, 0)
            state = AttentionState(
                jax.lax.dynamic_update_slice(state.keys, key.swapaxes(1, 2).astype(state.keys.dtype), at),
                jax.lax.dynamic_update_slice(state.values, value.swapaxes(1, 2).astype(state.values.dtype), at),
            )
            query, key, value = query.astype(state.keys.dtype), state.keys.swapaxes(1, 2), state.values.swapaxes(1, 2)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=window.mask(length, key.shape[1]))
        return self.out(mixed.astype(jnp.float32).reshape(batch, length, -1)), state

    def mix(
        self,
        hidden: Float[Array, "B N D"],
        state: AttentionState | ForkedState | None,
        window: Window | Fork,
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "B N D"], AttentionState | ForkedState | None]:
        """Attention as the only mixer of a layer."""
        mixed, state = self(inputs.tap("input.A", hidden), state, window)
        return inputs.tap("path.A", mixed), state

    def fork(self, state: AttentionState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> ForkedState:
        """Branches that share what was read, each with room for its own positions. Shared-prefix attention as in Hydragen
        (Juravsky et al. 2024, arXiv:2402.05099); here the prefixes are all those of one sequence.
        """
        batch, groups, _, width = state.keys.shape
        own = jnp.zeros((batch, groups, len(ends) * num_branches, capacity, width), state.keys.dtype)
        return ForkedState(state, BranchKeys(own, own))

    def rewind(self, state: AttentionState, position: int | Int[Array, ""]) -> AttentionState:
        """The state itself: keys after the window's offset are not seen, and are written over."""
        return state


def _branch_attention(
    query: Float[Array, "B R H C"], key: Float[Array, "B R G C"], value: Float[Array, "B R G C"], state: ForkedState, fork: Fork
) -> tuple[Float[Array, "B R H C"], ForkedState]:
    """Each branch attends to its part of the trunk and to its own positions, in one softmax."""
    batch, branches, num_heads, width = query.shape
    (trunk_keys, trunk_values), (own_keys, own_values) = state
    dtype = trunk_keys.dtype
    at = (0, 0, 0, fork.depth, 0)
    own_keys = jax.lax.dynamic_update_slice(own_keys, key.swapaxes(1, 2)[:, :, :, None].astype(dtype), at)
    own_values = jax.lax.dynamic_update_slice(own_values, value.swapaxes(1, 2)[:, :, :, None].astype(dtype), at)

    grouped = query.reshape(batch, branches, key.shape[2], -1, width).astype(dtype)
    products = dict(preferred_element_type=jnp.float32)
    to_trunk = jnp.einsum("brghc,bgpc->bghrp", grouped, trunk_keys, **products)
    to_own = jnp.einsum("brghc,bgrxc->bghrx", grouped, own_keys, **products)
    context, capacity = trunk_keys.shape[2], own_keys.shape[3]
    on_trunk, on_own = fork.masks(context, capacity)
    scores = jnp.concatenate(
        [jnp.where(on_trunk, to_trunk, -jnp.inf), jnp.where(on_own, to_own, -jnp.inf)],
        axis=-1,
    )
    weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(dtype)
    mixed = jnp.einsum("bghrp,bgpc->brghc", weights[..., :context], trunk_values, **products)
    mixed += jnp.einsum("bghrx,bgrxc->brghc", weights[..., context:], own_values, **products)
    return mixed.reshape(batch, branches, num_heads, width), ForkedState(state.trunk, BranchKeys(own_keys, own_values))
