"""The backbone that both language models share: chunks or tokens in front of it are the model's affair.

Its layers are named by a pattern of letters: A attention, S selective state space, C causal convolution, H Hopfield memory,
G gated recurrence. The letters of one group stand side by side in a layer, under a gate; groups follow each other and repeat:

    A       a transformer          SHA     three paths in every layer          C,H     convolution and memory by turns
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.attention import AttentionConfig
from calm.core.block import NORM, Block, Period
from calm.core.dense import Precision
from calm.core.mixer import Fork, MixerConfig, Window
from calm.core.mlp import SwiGLU
from calm.core.stack import Stack
from calm.core.unrolled import Unrolled
from calm.errors import UsageError
from calm.hybrid.convolution import ConvSSMConfig
from calm.hybrid.gates import Beside, gate_flops, gate_parameters
from calm.hybrid.gru import GRUConfig
from calm.hybrid.hopfield import HopfieldConfig
from calm.hybrid.state_space import SSMConfig
from calm.hybrid.taps import Tap

LETTERS = {
    "A": "attention",
    "S": "selective state space",
    "C": "causal convolution",
    "H": "Hopfield memory",
    "G": "gated recurrence",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A pre-norm transformer as LLaMA's (RMSNorm, rotary grouped-query attention, SwiGLU), or the same with other mixers."""

    dim: int = 256
    """model width D"""
    num_layers: int = 4
    pattern: str = "A"
    """what stands in the layers: A attention, S selective state space, C causal convolution, H Hopfield memory, G gated
    recurrence; "SHA" side by side under a gate, "C,H" by turns"""
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
    ssm: SSMConfig = SSMConfig()
    """of letter S"""
    conv: ConvSSMConfig = ConvSSMConfig()
    """of letter C"""
    hopfield: HopfieldConfig = HopfieldConfig()
    """of letter H"""
    gru: GRUConfig = GRUConfig()
    """of letter G"""
    num_segments: int = 1
    """how often the stack runs on the same input, a controller steering the gates from the second time on
    (`calm.hybrid.reasoner`); 1 = once, without one"""
    reasoner_gradient: Literal["one_step", "full"] = "one_step"
    """through the last segment and the controller alone, or through every segment"""

    def __post_init__(self) -> None:
        if min(self.dim, self.num_layers, self.num_heads, self.num_kv_heads, self.inner_dim) < 1:
            raise UsageError("backbone: dim, num_layers, num_heads, num_kv_heads and inner_dim must be at least 1")
        self._check_pattern()
        if "A" in self.pattern and (self.dim % self.num_heads or (self.dim // self.num_heads) % 2):
            raise UsageError(f"backbone: num_heads={self.num_heads} must divide dim={self.dim} into even head widths")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"backbone: num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.num_segments < 1:
            raise UsageError(f"backbone: num_segments must be at least 1, got {self.num_segments}")
        if self.num_segments > 1 and not self.num_shares:
            raise UsageError(
                f"backbone: num_segments={self.num_segments} steers gates, and pattern {self.pattern!r} has none; "
                "put two or more letters into a group"
            )
        if self.reasoner_gradient not in ("one_step", "full"):
            raise UsageError(f"backbone: reasoner_gradient must be one_step or full, got {self.reasoner_gradient!r}")

    def _check_pattern(self) -> None:
        for group in self.groups:
            if not group:
                raise UsageError(f"backbone: pattern {self.pattern!r} has a group without letters; write such as A, SHA or C,H")
            if unknown := [letter for letter in group if letter not in LETTERS]:
                known = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
                raise UsageError(f"backbone: pattern {self.pattern!r} has an unknown letter {unknown[0]!r}; there are {known}")
            if len(set(group)) < len(group):
                raise UsageError(f"backbone: pattern {self.pattern!r} has a letter twice in group {group!r}")
        if self.num_layers % len(self.groups):
            raise UsageError(
                f"backbone: num_layers={self.num_layers} must be a multiple of the {len(self.groups)} groups of "
                f"pattern {self.pattern!r}"
            )

    @property
    def groups(self) -> tuple[str, ...]:
        """The pattern's groups of letters: a layer each."""
        return tuple(self.pattern.split(","))

    @property
    def num_periods(self) -> int:
        """How often the pattern repeats: the length of the stack."""
        return self.num_layers // len(self.groups)

    @property
    def num_shares(self) -> int:
        """Logits of all gates of a period."""
        return sum(len(group) for group in self.groups if len(group) > 1)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """What a tap is asked about (`calm.hybrid.taps`)."""
        letters = sorted(set("".join(self.groups)))
        gates = ("gate",) if self.num_shares else ()
        controller = ("controller",) if self.num_segments > 1 else ()
        return (*(f"{at}.{letter}" for letter in letters for at in ("input", "path")), *gates, *controller, "hidden")

    def mixer(self, letter: str) -> MixerConfig:
        """The configuration behind a letter."""
        if letter == "A":
            return AttentionConfig(
                num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, rope_theta=self.rope_theta, init_std=self.init_std
            )
        of_letter: dict[str, Any] = {"S": self.ssm, "C": self.conv, "H": self.hopfield, "G": self.gru}
        return of_letter[letter]

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> Any:
        """A `Backbone`, or around it a `SegmentReasoner`, which is called the same way."""
        from calm.hybrid.reasoner import SegmentReasoner

        return (Backbone if self.num_segments == 1 else SegmentReasoner)(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        """Number of weights."""
        period = sum(
            sum(self.mixer(letter).parameters(self.dim) for letter in group)
            + gate_parameters(self.dim, len(group))
            + 2 * self.dim
            + SwiGLU.parameters(self.dim, self.inner_dim)
            for group in self.groups
        )
        return self.num_periods * period + self.dim + self._controller_size(1)

    def flops(self, context: int) -> int:
        """Forward FLOPs of one position in a sequence of `context` positions."""
        return self.num_segments * self._stack_flops(context) + (self.num_segments - 1) * self._controller_size(2)

    def training_flops(self, context: int) -> int:
        """Forward and backward FLOPs of one position. The backward pass costs twice the forward; under a reasoner's one-step
        gradient it goes through the last segment and what the controller gave it, and not through the segments before."""
        if self.num_segments == 1 or self.reasoner_gradient == "full":
            return 3 * self.flops(context)
        return self.flops(context) + 2 * (self._stack_flops(context) + self._controller_size(2))

    def _stack_flops(self, context: int) -> int:
        """Of one run of the stack, forward."""
        period = sum(
            sum(self.mixer(letter).flops(self.dim, context) for letter in group)
            + gate_flops(self.dim, len(group))
            + SwiGLU.flops(self.dim, self.inner_dim)
            for group in self.groups
        )
        return self.num_periods * period

    def _controller_size(self, of_weight: int) -> int:
        """Weights of the controller, or FLOPs, which are 2 for each weight of a product."""
        if self.num_segments == 1:
            return 0
        shares = self.num_periods * self.num_shares
        biases = self.dim + shares if of_weight == 1 else 0
        return of_weight * self.dim * (self.dim + shares) + biases


class BackboneState(NamedTuple):
    """All that a sequence leaves behind: a pytree of fixed shape that can be saved and copied, forked and rewound.

    `window` says where the next positions stand; `layers` holds the mixers' states with a leading axis over the periods of the
    pattern, or, for layers taken apart (`calm.core.unrolled`), a tuple with a place for each.
    """

    window: Window | Fork
    layers: Any


class Backbone(nnx.Module):
    """Layers, stacked and scanned, then a final RMSNorm.

    `(hidden, state) -> (hidden, state)` in four equal modes: the whole sequence (no state), a block of positions, one step, and
    one step of many branches of a sequence (`fork`).
    """

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config, self.tap = config, None
        sizes = dict(init_std=config.init_std, precision=precision)

        def layer(rngs: nnx.Rngs) -> Block | Period:
            if config.pattern == "A":
                attention = config.mixer("A")
                assert isinstance(attention, AttentionConfig)
                return Block(config.dim, config.inner_dim, attention, rngs=rngs, **sizes)
            groups = [{letter: config.mixer(letter) for letter in group} for group in config.groups]
            return Period(config.dim, config.inner_dim, groups, rngs=rngs, **sizes)

        self.blocks = Stack(layer, config.num_periods, rngs=rngs)
        self.norm = nnx.RMSNorm(config.dim, **NORM, rngs=rngs)

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """The state before the first position, with room for `context` positions; row b begins at `starts[b]`.

        A rewindable one can be forked and rewound; a recurrence then keeps its state behind every position, which costs memory.
        """
        layers = self.blocks.each(lambda layer: layer.init_state(batch, context, rewindable=rewindable))
        starts = jnp.zeros((batch,), jnp.int32) if starts is None else starts
        return BackboneState(Window(jnp.zeros((), jnp.int32), starts), layers)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """`num_branches` continuations of the sequence that was read, from behind its first `ends[a]` positions each.

        The result goes where the state went. A block `[B A*num_branches D]`, the branches of one end beside each other, is then
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
        """`taps` reads or replaces values on their way (`calm.hybrid.taps`); `bias` is added to the logits of the gates, X =
        those of all periods (`calm.hybrid.reasoner`).
        """
        hidden, state, _ = self._run(hidden, state, self.tap if taps is None else taps, bias, ())
        return hidden, state

    def readings(
        self, hidden: Float[Array, "B N D"], names: Collection[str], taps: Tap | None = None
    ) -> dict[str, dict[int, Array]]:
        """What passes through the taps of these names when a whole sequence is read: `{name: {layer: value}}`."""
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
        """The third is what was asked for, by name and layer."""
        batch, length, _ = hidden.shape
        config = self.config
        window = Window(jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)) if state is None else state.window
        if bias is not None:
            bias = jnp.moveaxis(bias.reshape(batch, length, config.num_periods, config.num_shares), 2, 0)
        along: dict[str, Any] = dict(period=np.arange(config.num_periods), own=self._own(), bias=bias)

        def step(layer: Block | Period, hidden: Array, xs: Any) -> tuple[Array, Any]:
            layer_state, beside = xs
            found: dict[tuple[str, int], Array] = {}
            hidden, layer_state = layer(hidden, layer_state, window, self._beside(beside, taps, names, found))
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

    def _own(self) -> tuple[dict[str, np.ndarray], ...]:
        """What differs from layer to layer, by group and letter, with a leading axis over the periods: how many refinements a
        memory has, counted over the layers that hold one.
        """
        periods, groups = self.config.num_periods, self.config.groups
        holding = [number for number, group in enumerate(groups) if "H" in group]
        depths = self.config.hopfield.depths(periods * len(holding))
        place = {number: np.arange(periods) * len(holding) + rank for rank, number in enumerate(holding)}
        return tuple({"H": depths[place[number]]} if number in place else {} for number in range(len(groups)))

    def _beside(
        self, along: dict[str, Any], taps: Tap | None, names: Collection[str], found: dict[tuple[str, int], Array]
    ) -> list[Beside]:
        """What each group of a period is given: its taps, its part of the bias, its own."""

        def tap_of(number: int) -> Callable[[str, Array], Array]:
            layer = along["period"] * len(self.config.groups) + number

            def tap(name: str, value: Array) -> Array:
                value = value if taps is None else taps(name, layer, value)
                if name in names:
                    found[name, number] = value
                return value

            return tap

        parts, at = [], 0
        for number, (group, own) in enumerate(zip(self.config.groups, along["own"], strict=True)):
            width = len(group) if len(group) > 1 else 0
            bias = None if along["bias"] is None or not width else along["bias"][..., at : at + width]
            parts.append(Beside(tap_of(number), bias, {letter: jnp.asarray(x) for letter, x in own.items()}))
            at += width
        return parts


def check_names(config: BackboneConfig, names: Collection[str]) -> None:
    """Raises `UsageError` for a name that no tap of this backbone has."""
    if unknown := sorted(set(names) - set(config.tap_names)):
        raise UsageError(f"readings: no tap is called {unknown[0]!r}; there are {', '.join(config.tap_names)}")


def by_layer(found: dict[tuple[str, int], Array], names: Collection[str]) -> dict[str, dict[int, Array]]:
    """Values by name and layer, name by name."""
    return {name: {layer: value for (of, layer), value in sorted(found.items()) if of == name} for name in names}


def _has_trunk(state: Any) -> bool:
    return hasattr(state, "trunk")


def _without_trunk(state: Any) -> Any:
    """What branches share stays as it is: a scan need not write it out."""
    return jax.tree.map(lambda x: x.own if _has_trunk(x) else x, state, is_leaf=_has_trunk)


def _with_trunk(before: Any, after: Any) -> Any:
    return jax.tree.map(lambda x, y: x._replace(own=y) if _has_trunk(x) else y, before, after, is_leaf=_has_trunk)
