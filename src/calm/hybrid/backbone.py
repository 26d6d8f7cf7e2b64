"""Backbones of other mixers than attention, named by a pattern of letters.

A attention, S selective state space, C causal convolution, H Hopfield memory, G gated recurrence, and any letter that a package
registers (`calm.core.mixer.MixerConfig`).

The letters of one group are paths side by side in a layer, weighed by a gate; groups follow each other and repeat:

    SHA     three paths in every layer          C,H     convolution and memory by turns
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.config import FrozenDict
from calm.core.dense import Precision
from calm.core.mixer import Fork, LayerInputs, MixerConfig, Window
from calm.core.mlp import SwiGLU
from calm.core.transformer import BackboneConfig, Block, TransformerConfig
from calm.errors import UsageError
from calm.hybrid.gates import GatedMixer, States, gate_flops, gate_parameters
from calm.hybrid.reasoner import SegmentReasoner


@BackboneConfig.register("hybrid")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(TransformerConfig):
    """A transformer with other mixers in attention's place; `num_heads` and its like describe the attention of letter A."""

    pattern: str = "SHA"
    """the mixers of the layers: "SHA" side by side under a gate, "C,H" by turns"""
    mixers: dict[str, MixerConfig] = dataclasses.field(default_factory=FrozenDict)
    """configuration of each letter but A; letters that are not given have their mixer's defaults"""
    num_segments: int = 1
    """how often the stack runs on the same input, a controller steering the gates from the second time on
    (`calm.hybrid.reasoner`); 1 = once, without one"""
    reasoner_gradient: Literal["one_step", "full"] = "one_step"
    """through the last segment and the controller alone, or through every segment"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_pattern()
        if "A" in self.mixers:
            raise UsageError(
                "backbone: mixers.A: attention's sizes are the backbone's own num_heads, num_kv_heads and rope_theta"
            )
        letters = [letter for letter in dict.fromkeys("".join(self.groups)) if letter != "A"]
        mixers = {letter: self.mixers.get(letter) or MixerConfig.member(letter)() for letter in letters}
        object.__setattr__(self, "mixers", FrozenDict(mixers))
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
            if unknown := [letter for letter in group if letter not in MixerConfig.names()]:
                known = ", ".join(MixerConfig.names())
                raise UsageError(f"backbone: pattern {self.pattern!r} has an unknown letter {unknown[0]!r}; there are {known}")
            if len(set(group)) < len(group):
                raise UsageError(f"backbone: pattern {self.pattern!r} has a letter twice in group {group!r}")
        if self.num_layers % len(self.groups):
            raise UsageError(
                f"backbone: num_layers={self.num_layers} must be a multiple of the {len(self.groups)} groups of "
                f"pattern {self.pattern!r}"
            )

    @property
    def has_attention(self) -> bool:
        return "A" in self.pattern

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.pattern.split(","))

    @property
    def num_shares(self) -> int:
        """Number of logits of all gates of a period."""
        return sum(len(group) for group in self.groups if len(group) > 1)

    @property
    def tap_names(self) -> tuple[str, ...]:
        letters = sorted(set("".join(self.groups)))
        gates = ("gate",) if self.num_shares else ()
        controller = ("controller",) if self.num_segments > 1 else ()
        return (*(f"{at}.{letter}" for letter in letters for at in ("input", "path")), *gates, *controller, "hidden")

    def mixer(self, letter: str) -> MixerConfig:
        """The configuration of a letter's mixer."""
        return self.attention if letter == "A" else self.mixers[letter]

    def layer_constants(self) -> tuple[dict[str, np.ndarray], ...]:
        """By group and letter, over the periods; a mixer counts the layers that hold one (`MixerConfig.layer_constants`)."""
        constants: list[dict[str, np.ndarray]] = [{} for _ in self.groups]
        for letter, mixer in self.mixers.items():
            holding = [number for number, group in enumerate(self.groups) if letter in group]
            values = mixer.layer_constants(self.num_periods * len(holding))
            if values is not None:
                for rank, number in enumerate(holding):
                    constants[number][letter] = values[np.arange(self.num_periods) * len(holding) + rank]
        return tuple(constants)

    def build_layer(self, *, rngs: nnx.Rngs, precision: Precision) -> nnx.Module:
        if self.groups == ("A",):
            return super().build_layer(rngs=rngs, precision=precision)
        groups = [{letter: self.mixer(letter) for letter in group} for group in self.groups]
        return Period(self.dim, self.inner_dim, groups, init_std=self.init_std, rngs=rngs, precision=precision)

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> Any:
        """A `Backbone`, or around it a `SegmentReasoner`, which is called the same way."""
        if self.num_segments == 1:
            return super().build(rngs=rngs, precision=precision)
        return SegmentReasoner(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        period = sum(
            sum(self.mixer(letter).parameters(self.dim) for letter in group)
            + gate_parameters(self.dim, len(group))
            + 2 * self.dim
            + SwiGLU.parameters(self.dim, self.inner_dim)
            for group in self.groups
        )
        return self.num_periods * period + self.dim + self._controller_size(1)

    def flops(self, context: int) -> int:
        return self.num_segments * self._stack_flops(context) + (self.num_segments - 1) * self._controller_size(2)

    def training_flops(self, context: int) -> int:
        """Forward and backward FLOPs of one position. The backward pass costs twice the forward; under a reasoner's one-step
        gradient it goes through the last segment and its controller, and not through the segments before."""
        if self.num_segments == 1 or self.reasoner_gradient == "full":
            return 3 * self.flops(context)
        return self.flops(context) + 2 * (self._stack_flops(context) + self._controller_size(2))

    def _stack_flops(self, context: int) -> int:
        """Forward FLOPs of one run of the stack."""
        period = sum(
            sum(self.mixer(letter).flops(self.dim, context) for letter in group)
            + gate_flops(self.dim, len(group))
            + SwiGLU.flops(self.dim, self.inner_dim)
            for group in self.groups
        )
        return self.num_periods * period

    def _controller_size(self, of_weight: int) -> int:
        """Weights of the controller, or its FLOPs, which are 2 for each weight of a product."""
        if self.num_segments == 1:
            return 0
        shares = self.num_periods * self.num_shares
        biases = self.dim + shares if of_weight == 1 else 0
        return of_weight * self.dim * (self.dim + shares) + biases


def of_pattern(base: TransformerConfig, pattern: str, **changes: Any) -> TransformerConfig:
    """`base` with the mixers of a pattern; of "A" alone a plain transformer. `mixers` and other fields may be changed too."""
    own = {field.name: getattr(base, field.name) for field in dataclasses.fields(TransformerConfig)}
    if pattern == "A" and changes.get("num_segments", 1) == 1:
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        return TransformerConfig(**own | {name: value for name, value in changes.items() if name in names})
    for name in ("mixers", "reasoner_gradient"):
        if hasattr(base, name):
            changes.setdefault(name, getattr(base, name))
    return HybridConfig(**own | changes, pattern=pattern)


class Period(nnx.Module):
    """Blocks with a gated mixer, one for each group of a pattern's letters; the state has a place for each."""

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
        def block(mixers: Mapping[str, MixerConfig]) -> Block:
            def mixer(rngs: nnx.Rngs) -> GatedMixer:
                return GatedMixer(dim, mixers, rngs=rngs, precision=precision)

            return Block(dim, inner_dim, mixer, name="mixer", init_std=init_std, rngs=rngs, precision=precision)

        self.groups = nnx.List([block(mixers) for mixers in groups])

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        states: tuple[States, ...] | None,
        window: Window | Fork,
        inputs: tuple[LayerInputs, ...],
    ) -> tuple[Float[Array, "B N D"], tuple[States, ...] | None]:
        after: list[Any] = []
        for number, (block, of_group) in enumerate(zip(self.groups, inputs, strict=True)):
            hidden, state = block(hidden, None if states is None else states[number], window, (of_group,))
            after.append(state)
        return hidden, None if states is None else tuple(after)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> tuple[States, ...]:
        return tuple(block.init_state(batch, context, rewindable=rewindable) for block in self.groups)

    def fork(self, states: tuple[States, ...], ends: Int[Array, "A"], num_branches: int, capacity: int) -> tuple[States, ...]:
        pairs = zip(self.groups, states, strict=True)
        return tuple(block.fork(state, ends, num_branches, capacity) for block, state in pairs)

    def rewind(self, states: tuple[States, ...], position: int | Int[Array, ""]) -> tuple[States, ...]:
        return tuple(block.rewind(state, position) for block, state in zip(self.groups, states, strict=True))
