"""The layers of a backbone, and the period of layers that repeats along it."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.attention import AttentionConfig, AttentionState, ForkedState
from calm.core.dense import Precision
from calm.core.mixer import Fork, MixerConfig, Window
from calm.core.mlp import SwiGLU
from calm.hybrid.gates import Beside, GatedMixer, States

NORM = dict(epsilon=1e-6)


class Block(nnx.Module):
    """The transformer's layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        attention: AttentionConfig,
        *,
        init_std: float | None,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        self.norm_attention = nnx.RMSNorm(dim, **NORM, rngs=rngs)
        self.attention = attention.build(dim, rngs=rngs, precision=precision)
        self.norm_mlp = nnx.RMSNorm(dim, **NORM, rngs=rngs)
        self.mlp = SwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        state: AttentionState | ForkedState | None,
        window: Window | Fork,
        beside: Sequence[Beside],
    ) -> tuple[Float[Array, "B N D"], AttentionState | ForkedState | None]:
        tap = beside[0].tap
        mixed, state = self.attention(tap("input.A", self.norm_attention(hidden)), state, window)
        hidden = hidden + tap("path.A", mixed)
        return tap("hidden", hidden + self.mlp(self.norm_mlp(hidden))), state

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> AttentionState:
        return self.attention.init_state(batch, context, rewindable=rewindable)

    def fork(self, state: AttentionState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> ForkedState:
        return self.attention.fork(state, ends, num_branches, capacity)

    def rewind(self, state: AttentionState, position: int | Int[Array, ""]) -> AttentionState:
        return self.attention.rewind(state, position)


class HybridBlock(nnx.Module):
    """x + gated mixer(norm(x)), then x + mlp(norm(x)): the transformer's layer with other mixers in attention's place."""

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        mixers: Mapping[str, MixerConfig],
        *,
        init_std: float | None,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        self.norm_mixer = nnx.RMSNorm(dim, **NORM, rngs=rngs)
        self.mixer = GatedMixer(dim, mixers, rngs=rngs, precision=precision)
        self.norm_mlp = nnx.RMSNorm(dim, **NORM, rngs=rngs)
        self.mlp = SwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B N D"], states: States | None, window: Window | Fork, beside: Beside
    ) -> tuple[Float[Array, "B N D"], States | None]:
        mixed, states = self.mixer(self.norm_mixer(hidden), states, window, beside)
        hidden = hidden + mixed
        return beside.tap("hidden", hidden + self.mlp(self.norm_mlp(hidden))), states


class Period(nnx.Module):
    """Hybrid blocks, one for each group of a pattern's letters, one after the other; its state has a place for each."""

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        groups: Sequence[Mapping[str, MixerConfig]],
        *,
        init_std: float | None,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        sizes = dict(init_std=init_std, rngs=rngs, precision=precision)
        self.groups = nnx.List([HybridBlock(dim, inner_dim, mixers, **sizes) for mixers in groups])

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        states: tuple[States, ...] | None,
        window: Window | Fork,
        beside: Sequence[Beside],
    ) -> tuple[Float[Array, "B N D"], tuple[States, ...] | None]:
        after: list[Any] = []
        for number, (block, of_group) in enumerate(zip(self.groups, beside, strict=True)):
            hidden, state = block(hidden, None if states is None else states[number], window, of_group)
            after.append(state)
        return hidden, None if states is None else tuple(after)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> tuple[States, ...]:
        return tuple(block.mixer.init_state(batch, context, rewindable=rewindable) for block in self.groups)

    def fork(self, states: tuple[States, ...], ends: Int[Array, "A"], num_branches: int, capacity: int) -> tuple[States, ...]:
        pairs = zip(self.groups, states, strict=True)
        return tuple(block.mixer.fork(state, ends, num_branches, capacity) for block, state in pairs)

    def rewind(self, states: tuple[States, ...], position: int | Int[Array, ""]) -> tuple[States, ...]:
        return tuple(block.mixer.rewind(state, position) for block, state in zip(self.groups, states, strict=True))
