"""The transformer that both language models share: chunks or tokens in front of it are the model's affair."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.nn.attention import AttentionConfig, AttentionState, BranchKeys, CausalAttention, ForkedState
from calm.nn.dense import Precision
from calm.nn.mixer import Fork, Window
from calm.nn.mlp import SwiGLU
from calm.nn.stack import Stack

LayerState = AttentionState | ForkedState | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A pre-norm LLaMA transformer: RMSNorm, rotary grouped-query attention, SwiGLU."""

    dim: int = 256
    """model width D"""
    num_layers: int = 4
    num_heads: int = 4
    """query heads H"""
    num_kv_heads: int = 4
    """key-value heads G; divides H"""
    inner_dim: int = 688
    """inner width of the SwiGLU"""
    rope_theta: float = 10_000.0
    init_std: float | None = None
    """standard deviation of the kernels; none = 1 / sqrt(fan-in); the published models use 0.02"""
    remat: bool = False
    """recompute layers in the backward pass: less memory, more time"""

    def __post_init__(self) -> None:
        if min(self.dim, self.num_layers, self.num_heads, self.num_kv_heads, self.inner_dim) < 1:
            raise UsageError("backbone: dim, num_layers, num_heads, num_kv_heads and inner_dim must be at least 1")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(f"backbone: num_heads={self.num_heads} must divide dim={self.dim} into even head widths")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"backbone: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Backbone":
        return Backbone(self, rngs=rngs, precision=precision)

    def flops(self, context: int) -> int:
        """Forward FLOPs of one position in a sequence of `context` positions."""
        attention = AttentionConfig(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads).flops(self.dim, context)
        return self.num_layers * (attention + SwiGLU.flops(self.dim, self.inner_dim))


class BackboneState(NamedTuple):
    """All that a sequence leaves behind: a pytree of fixed shape that can be saved, copied and rewound.

    `window` says where the next positions stand; `layers` holds each layer's state with a leading layer axis, or, for layers
    taken apart (`calm.nn.unrolled`), one state per layer.
    """

    window: Window | Fork
    layers: AttentionState | ForkedState | tuple[AttentionState, ...]

    def fork(self, ends: Int[Array, "A"], num_branches: int, capacity: int) -> "BackboneState":
        """`num_branches` continuations of the sequence that was read, from behind its first `ends[a]` positions each.

        The result goes where the state went. A block `[B A*num_branches D]`, the branches of one end beside each other, is then
        the next position of every branch; `capacity` of them can be read. A branch computes what a copy of the state, rewound
        to its end, would compute step by step, at the memory of one trunk. Shared-prefix attention as in
        Hydragen (Juravsky et al. 2024, arXiv:2402.05099); here the prefixes are all those of one sequence.
        """
        if isinstance(self.window, Fork) or not isinstance(self.layers, AttentionState):
            raise UsageError("fork: takes the state of a sequence, with layers stacked")
        layers, batch, groups, _, width = self.layers.keys.shape
        own = jnp.zeros((layers, batch, groups, len(ends) * num_branches, capacity, width), self.layers.keys.dtype)
        window = Fork(jnp.repeat(ends, num_branches), jnp.zeros((), jnp.int32), self.window.starts)
        return BackboneState(window, ForkedState(self.layers, BranchKeys(own, own)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs, precision: Precision):
        self.norm_attention = nnx.RMSNorm(config.dim, epsilon=1e-6, rngs=rngs)
        self.attention = CausalAttention(
            config.dim,
            config.num_heads,
            config.num_kv_heads,
            rope_theta=config.rope_theta,
            init_std=config.init_std,
            precision=precision,
            rngs=rngs,
        )
        self.norm_mlp = nnx.RMSNorm(config.dim, epsilon=1e-6, rngs=rngs)
        self.mlp = SwiGLU(config.dim, config.inner_dim, init_std=config.init_std, precision=precision, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: LayerState, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], LayerState]:
        mixed, state = self.attention(self.norm_attention(hidden), state, window)
        hidden = hidden + mixed
        return hidden + self.mlp(self.norm_mlp(hidden)), state


class Backbone(nnx.Module):
    """Blocks, stacked and scanned, then a final RMSNorm.

    `(hidden, state) -> (hidden, state)` in four equal modes: the whole sequence (no state), a block of positions, one step, and
    one step of many branches of a sequence (`BackboneState.fork`).
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config = config
        self.blocks = Stack(lambda rngs: Block(config, rngs=rngs, precision=precision), config.num_layers, rngs=rngs)
        self.norm = nnx.RMSNorm(config.dim, epsilon=1e-6, rngs=rngs)

    def init_state(self, batch: int, context: int, starts: Int[Array, "B"] | None = None) -> BackboneState:
        """The state before the first position, with room for `context` positions."""
        layer = self.blocks.layer.attention.init_state(batch, context)
        layers = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_layers, *x.shape)), layer)
        starts = jnp.zeros((batch,), jnp.int32) if starts is None else starts
        return BackboneState(Window(jnp.zeros((), jnp.int32), starts), layers)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: BackboneState | None = None
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        batch, length, _ = hidden.shape
        window = Window(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)) if state is None else state.window

        def step(block: Block, hidden: Array, layer_state: LayerState) -> tuple[Array, Any]:
            hidden, layer_state = block(hidden, layer_state, window)
            return hidden, layer_state.own if isinstance(layer_state, ForkedState) else layer_state  # a trunk stays as it is

        layers = None if state is None else state.layers
        hidden, read = self.blocks.scan(step, hidden, layers, remat=self.config.remat)
        if state is not None:
            layers = ForkedState(layers.trunk, read) if isinstance(layers, ForkedState) else read
            state = BackboneState(window.after(length), layers)
        return self.norm(hidden), state
