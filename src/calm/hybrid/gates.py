"""Paths side by side, each of them a mixer, under a gate that decides position by position how much of each is heard."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.mixer import Fork, MixerConfig, Window

GATE_STD = 0.1
"""standard deviation of a new gate's logits: shares begin within a few per cent of equal"""

States = dict[str, Any]
"""a state for each letter"""


class Beside(NamedTuple):
    """What a layer is given beside hidden states and mixers' states."""

    tap: Callable[[str, Array], Array] = lambda name, value: value
    """`(name, value) -> value` (`calm.hybrid.taps`); the layer is known to whoever made it"""
    bias: Float[Array, "B N P"] | None = None
    """added to the gate's logits"""
    own: Mapping[str, Array] = {}
    """what mixers have for this layer alone, by letter: a fourth argument"""


class GatedMixer(nnx.Module):
    """sum_p g_p(x) path_p(x), with shares g = softmax(W x + b + bias). One path alone has no gate.

    A mixture of experts (Jacobs et al. 1991) in which every expert is computed: a recurrence or a memory that is left out at a
    position would miss it later.
    """

    def __init__(self, dim: int, mixers: Mapping[str, MixerConfig], *, rngs: nnx.Rngs, precision: Precision):
        self.paths = nnx.Dict({letter: config.build(dim, rngs=rngs, precision=precision) for letter, config in mixers.items()})
        self.letters = "".join(mixers)
        std = GATE_STD * dim**-0.5
        several = len(mixers) > 1
        self.gate = Dense(dim, len(mixers), use_bias=True, init_std=std, precision=precision, rngs=rngs) if several else None

    def __call__(
        self, hidden: Float[Array, "B N D"], states: States | None, window: Window | Fork, beside: Beside
    ) -> tuple[Float[Array, "B N D"], States | None]:
        tap, mixed, after = beside.tap, [], {}
        for letter in self.letters:
            state = None if states is None else states[letter]
            own = [beside.own[letter]] if letter in beside.own else []
            found, after[letter] = self.paths[letter](tap(f"input.{letter}", hidden), state, window, *own)
            mixed.append(tap(f"path.{letter}", found))
        states = None if states is None else after
        if self.gate is None:
            return mixed[0], states
        logits = self.gate(hidden)
        shares = tap("gate", jax.nn.softmax(logits if beside.bias is None else logits + beside.bias, axis=-1))
        weighed = [shares[..., path : path + 1] * found for path, found in enumerate(mixed)]
        return sum(weighed[1:], start=weighed[0]), states

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> States:
        return {letter: self.paths[letter].init_state(batch, context, rewindable=rewindable) for letter in self.letters}

    def fork(self, states: States, ends: Int[Array, "A"], num_branches: int, capacity: int) -> States:
        return {letter: self.paths[letter].fork(states[letter], ends, num_branches, capacity) for letter in self.letters}

    def rewind(self, states: States, position: int | Int[Array, ""]) -> States:
        return {letter: self.paths[letter].rewind(states[letter], position) for letter in self.letters}


def gate_parameters(dim: int, num_paths: int) -> int:
    """Weights of the gate over so many paths."""
    return (dim + 1) * num_paths if num_paths > 1 else 0


def gate_flops(dim: int, num_paths: int) -> int:
    """Forward FLOPs of the gate at one position."""
    return dense_flops(dim, num_paths) if num_paths > 1 else 0
