"""The causal transformer between stem and head: blocks of attention and MLP, stacked and scanned.

B batch · N positions (chunks, or tokens of the baseline) · D model width · X gate logits of all layers

The stack is written for any layer that a `BackboneConfig` builds. The wing `calm.hybrid` puts other mixers and gates
between them in attention's place; here a layer is the transformer's.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.attention import AttentionConfig
from calm.core.dense import Precision
from calm.core.mixer import Fork, LayerInputs, Tap, Window
from calm.core.mlp import SwiGLU
from calm.core.stack import Stack
from calm.core.unrolled import Unrolled
from calm.errors import UsageError
from calm.registry import Registered

NORM = dict(epsilon=1e-6)


class BackboneConfig(Registered, family="backbone"):
    """Family of the backbones' configurations. Members derive from `TransformerConfig`, which has all that one must define."""


@BackboneConfig.register("transformer")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BackboneConfig):
    """A pre-norm transformer as LLaMA's: RMSNorm, rotary grouped-query attention, SwiGLU."""

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
        if self.has_attention and (self.dim % self.num_heads or (self.dim // self.num_heads) % 2):
            raise UsageError(f"backbone: num_heads={self.num_heads} must divide dim={self.dim} into even head widths")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"backbone: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends."""
        return True

    @property
    def pattern(self) -> str:
        """Letters of the mixers in the layers; a transformer has attention alone."""
        return "A"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of mixers' letters that repeat along the layers, one group a layer."""
        return ("A",)

    @property
    def num_periods(self) -> int:
        """How often the groups repeat: the length of the stack."""
        return self.num_layers // len(self.groups)

    @property
    def num_shares(self) -> int:
        """Number of gate logits in one period; a transformer has none."""
        return 0

    @property
    def num_segments(self) -> int:
        """How often the stack runs on the same input."""
        return 1

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of the values that pass through a tap (`calm.hybrid.taps`)."""
        return ("input.A", "path.A", "hidden")

    @property
    def attention(self) -> AttentionConfig:
        """The configuration of the attention."""
        return AttentionConfig(
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, rope_theta=self.rope_theta, init_std=self.init_std
        )

    def layer_constants(self) -> tuple[dict[str, np.ndarray], ...]:
        """Arrays that differ between layers without being weights: for each group, by letter, with a leading period axis."""
        return tuple({} for _ in self.groups)

    def build_layer(self, *, rngs: nnx.Rngs, precision: Precision) -> nnx.Module:
        """The layers of one period."""

        def attention(rngs: nnx.Rngs) -> nnx.Module:
            return self.attention.build(self.dim, rngs=rngs, precision=precision)

        sizes = dict(name="attention", init_std=self.init_std, rngs=rngs, precision=precision)
        return Block(self.dim, self.inner_dim, attention, **sizes)

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> Any:
        """A `Backbone`, or something that is called as it is."""
        return Backbone(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        """Number of weights."""
        layer = self.attention.parameters(self.dim) + 2 * self.dim + SwiGLU.parameters(self.dim, self.inner_dim)
        return self.num_layers * layer + self.dim

    def flops(self, context: int) -> int:
        """Forward FLOPs of one position in a sequence of `context` positions."""
        layer = self.attention.flops(self.dim, context) + SwiGLU.flops(self.dim, self.inner_dim)
        return self.num_layers * layer

    def training_flops(self, context: int) -> int:
        """Forward and backward FLOPs of one position; the backward pass costs twice the forward."""
        return 3 * self.flops(context)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). The mixer is attention in a transformer, a gated mixer in a hybrid.

    `name` is the name of the mixer's weights; `mixer.mix` is called with the layer's inputs beside the hidden states.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        build_mixer: Callable[[nnx.Rngs], nnx.Module],
        *,
        name: str,
        init_std: float | None,
        rngs: nnx.Rngs,
        precision: Precision,
    ):
        self.name = name
        setattr(self, f"norm_{name}", nnx.RMSNorm(dim, **NORM, rngs=rngs))
        setattr(self, name, build_mixer(rngs))
        self.norm_mlp = nnx.RMSNorm(dim, **NORM, rngs=rngs)
        self.mlp = SwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

    @property
    def _mixer(self) -> Any:
        return getattr(self, self.name)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: Any, window: Window | Fork, inputs: tuple[LayerInputs, ...]
    ) -> tuple[Float[Array, "B N D"], Any]:
        (of_layer,) = inputs
        mixed, state = self._mixer.mix(getattr(self, f"norm_{self.name}")(hidden), state, window, of_layer)
        hidden = hidden + mixed
        return of_layer.tap("hidden", hidden + self.mlp(self.norm_mlp(hidden))), state

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> Any:
        return self._mixer.init_state(batch, context, rewindable=rewindable)

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        return self._mixer.fork(state, ends, num_branches, capacity)

    def rewind(self, state: Any, position: int | Int[Array, ""]) -> Any:
        return self._mixer.rewind(state, position)


class BackboneState(NamedTuple):
    """The state of a sequence after it was read: a pytree of fixed shape that can be saved, copied, forked and rewound.

    `window` holds the place of the next positions; `layers` holds the mixers' states with a leading axis over the periods
    of the pattern, or, for layers taken apart (`calm.core.unrolled`), a tuple with a place for each.
    """

    window: Window | Fork
    layers: Any


class Backbone(nnx.Module):
    """Layers, stacked and scanned, then a final RMSNorm.

    `(hidden, state) -> (hidden, state)` in four equal modes: the whole sequence (no state), a block of positions, one step, and
    one step of many branches of a sequence (`fork`).
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config, self.tap = config, None
        self.blocks = Stack(lambda rngs: config.build_layer(rngs=rngs, precision=precision), config.num_periods, rngs=rngs)
        self.norm = nnx.RMSNorm(config.dim, **NORM, rngs=rngs)

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """The state before the first position, with room for `context` positions; row b begins at `starts[b]`.

        A rewindable state can be forked and rewound; a recurrence then keeps its state after every position, which costs
        memory.
        """
        layers = self.blocks.each(lambda layer: layer.init_state(batch, context, rewindable=rewindable))
        starts = jnp.zeros((batch,), jnp.int32) if starts is None else starts
        return BackboneState(Window(jnp.zeros((), jnp.int32), starts), layers)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """`num_branches` continuations of the sequence that was read, each from after its first `ends[a]` positions.

        The result takes the state's place. A block `[B A*num_branches D]`, the branches of one end beside each other, is then
        the next position of every branch; `capacity` of them can be read. A branch computes what a copy of the state, rewound
        to its end, would compute step by step; attention keeps one trunk for all.
        """
        if isinstance(state.window, Fork) or isinstance(self.blocks, Unrolled):
            raise UsageError("fork: takes the state of a sequence, with layers stacked")
        layers = self.blocks.each(lambda layer, state: layer.fork(state, ends, num_branches, capacity), state.layers)
        window = Fork(jnp.repeat(ends, num_branches), jnp.zeros((), jnp.int32), state.window.starts)
        return BackboneState(window, layers)

    def rewind(self, state: BackboneState, position: int | Int[Array, ""]) -> BackboneState:
        """The state as it was after `position` of the positions read, with layers stacked or taken apart."""
        if isinstance(state.window, Fork):
            raise UsageError("rewind: takes the state of a sequence, not of its branches")
        layers = self.blocks.each(lambda layer, state: layer.rewind(state, position), state.layers)
        return BackboneState(state.window._replace(offset=jnp.asarray(position, jnp.int32)), layers)

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        state: BackboneState | None = None,
        taps: Tap | None = None,
        bias: Float[Array, "B N X"] | None = None,
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        """Hidden states after the last layer and the final norm, and the state if one was given.

        `taps` reads or replaces values on their way (`calm.hybrid.taps`); `bias` is added to the gates' logits.
        """
        hidden, state, _ = self._run(hidden, state, self.tap if taps is None else taps, bias, ())
        return hidden, state

    def readings(
        self, hidden: Float[Array, "B N D"], names: Collection[str], taps: Tap | None = None
    ) -> dict[str, dict[int, Array]]:
        """Values at the taps of these names when a whole sequence is read: `{name: {layer: value}}`."""
        check_names(self.config, names)
        found = self._run(hidden, None, self.tap if taps is None else taps, None, names)[2]
        return by_layer(found, names)

    def _run(
        self,
        hidden: Float[Array, "B N D"],
        state: BackboneState | None,
        taps: Tap | None,
        bias: Float[Array, "B N X"] | None,
        names: Collection[str],
    ) -> tuple[Float[Array, "B N D"], BackboneState | None, dict[tuple[str, int], Array]]:
        """The third result holds the readings asked for, by name and layer."""
        batch, length, _ = hidden.shape
        config = self.config
        window = Window(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)) if state is None else state.window
        if bias is not None:
            bias = jnp.moveaxis(bias.reshape(batch, length, config.num_periods, config.num_shares), 2, 0)
        along: dict[str, Any] = dict(period=np.arange(config.num_periods), constants=self.config.layer_constants(), bias=bias)

        def step(layer: Any, hidden: Array, xs: Any) -> tuple[Array, Any]:
            layer_state, of_layer = xs
            found: dict[tuple[str, int], Array] = {}
            hidden, layer_state = layer(hidden, layer_state, window, self._inputs(of_layer, taps, names, found))
            return hidden, (_without_trunk(layer_state), found)

        xs = self.blocks.beside(None if state is None else state.layers, along)
        hidden, ys = self.blocks.scan(step, hidden, xs, remat=config.remat)
        apart = isinstance(self.blocks, Unrolled)
        read, found = zip(*ys, strict=True) if apart else ys
        if state is not None:
            state = BackboneState(window.after(length), read if apart else _with_trunk(state.layers, read))
        periods: dict[tuple[str, int], Any] = {key: [each[key] for each in found] for key in found[0]} if apart else dict(found)
        by_place = {
            (name, period * len(config.groups) + group): values[period]
            for (name, group), values in periods.items()
            for period in range(config.num_periods)
        }
        return self.norm(hidden), state, by_place

    def _inputs(
        self, along: Mapping[str, Any], taps: Tap | None, names: Collection[str], found: dict[tuple[str, int], Array]
    ) -> tuple[LayerInputs, ...]:
        """The inputs of each layer of a period beside hidden states; taps write readings into `found`."""

        def tap_of(number: int) -> Callable[[str, Array], Array]:
            layer = along["period"] * len(self.config.groups) + number

            def tap(name: str, value: Array) -> Array:
                value = value if taps is None else taps(name, layer, value)
                if name in names:
                    found[name, number] = value
                return value

            return tap

        parts, at = [], 0
        for number, (group, constants) in enumerate(zip(self.config.groups, along["constants"], strict=True)):
            width = len(group) if len(group) > 1 else 0
            bias = None if along["bias"] is None or not width else along["bias"][..., at : at + width]
            parts.append(LayerInputs(tap_of(number), bias, {letter: jnp.asarray(x) for letter, x in constants.items()}))
            at += width
        return tuple(parts)


def check_names(config: TransformerConfig, names: Collection[str]) -> None:
    """Raises `UsageError` for a name that no tap of this backbone has."""
    if unknown := sorted(set(names) - set(config.tap_names)):
        raise UsageError(f"readings: no tap is called {unknown[0]!r}; there are {', '.join(config.tap_names)}")


def by_layer(found: dict[tuple[str, int], Array], names: Collection[str]) -> dict[str, dict[int, Array]]:
    """Values by name and layer, name by name."""
    return {name: {layer: value for (of, layer), value in sorted(found.items()) if of == name} for name in names}


def _has_trunk(state: Any) -> bool:
    return hasattr(state, "trunk")


def _without_trunk(state: Any) -> Any:
    """Leaves out what branches share and do not change, so that a scan need not write it."""
    return jax.tree.map(lambda x: x.own if _has_trunk(x) else x, state, is_leaf=_has_trunk)


def _with_trunk(before: Any, after: Any) -> Any:
    return jax.tree.map(lambda x, y: x._replace(own=y) if _has_trunk(x) else y, before, after, is_leaf=_has_trunk)
