"""A backbone that reads its input again and again, each time with its gates set by what it made of the input before.

Every segment runs the same stack on the same input. A controller reads the hidden state that the segment before left at the
same position and gives a bias on the logits of every gate of the segment that comes; nothing else passes from one to the next.
As the controller's last layer begins at 0, all segments begin equal, and a controller that stays at 0 leaves them so.

The one-step gradient ends where the controller reads: a training step differentiates the last segment and the controller, at
the memory of one segment, as the one-step gradient of nested recurrences does (Wang et al. 2025, arXiv:2506.21734). "full" goes
through every segment. docs/backbones.md compares the two.

It is called as a `Backbone` is; in generation every segment keeps a state of its own.
"""

from collections.abc import Collection
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision
from calm.core.mixer import Tap
from calm.core.transformer import Backbone, BackboneState, by_layer, check_names
from calm.core.unrolled import Unrolled


class Controller(nnx.Module):
    """A perceptron with one hidden layer of width D from a segment's hidden state to the bias of the next one's gates.

    It sees its own position alone: what it knows of the past, the hidden state has told it, and of the future nothing.
    """

    def __init__(self, dim: int, num_outputs: int, *, rngs: nnx.Rngs, precision: Precision):
        self.inner = Dense(dim, dim, use_bias=True, precision=precision, rngs=rngs)
        self.out = Dense(dim, num_outputs, use_bias=True, init_std=0.0, precision=precision, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N X"]:
        return self.out(jax.nn.silu(self.inner(hidden)))


class SegmentReasoner(nnx.Module):
    """`num_segments` runs of one `Backbone`, whose last hidden state is returned; `config` is a `HybridConfig`."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config, self.tap = config, None
        self.stack = Backbone(config, rngs=rngs, precision=precision)
        self.controller = Controller(config.dim, config.num_periods * config.num_shares, rngs=rngs, precision=precision)

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """Same as `Backbone.init_state`, with a state for every segment."""
        state = self.stack.init_state(batch, context, starts, rewindable=rewindable)
        return state._replace(layers=(state.layers,) * self.config.num_segments)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """Same as `Backbone.fork`."""
        return self._join([self.stack.fork(segment, ends, num_branches, capacity) for segment in self._segments(state)])

    def rewind(self, state: BackboneState, position: int | Int[Array, ""]) -> BackboneState:
        """Same as `Backbone.rewind`."""
        return self._join([self.stack.rewind(segment, position) for segment in self._segments(state)])

    def __call__(
        self, hidden: Float[Array, "B N D"], state: BackboneState | None = None, taps: Tap | None = None
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        """Same as `Backbone.__call__`; to a tap, the layers of the second segment go on where those of the first ended."""
        hidden, state, _ = self._run(hidden, state, self.tap if taps is None else taps, ())
        return hidden, state

    def readings(
        self, hidden: Float[Array, "B N D"], names: Collection[str], taps: Tap | None = None
    ) -> dict[str, dict[int, Array]]:
        """Same as `Backbone.readings`, over the layers of all segments."""
        check_names(self.config, names)
        return by_layer(self._run(hidden, None, self.tap if taps is None else taps, names)[2], names)

    def _run(
        self, embedded: Float[Array, "B N D"], state: BackboneState | None, taps: Tap | None, names: Collection[str]
    ) -> tuple[Float[Array, "B N D"], BackboneState | None, dict[tuple[str, int], Array]]:
        number, layers = self.config.num_segments, self.config.num_layers
        states = [None] * number if state is None else self._segments(state)
        hidden, bias, found, after = embedded, None, {}, []
        for segment in range(number):
            first = segment * layers
            if segment:
                read = jax.lax.stop_gradient(hidden) if self.config.reasoner_gradient == "one_step" else hidden
                bias = self.controller(read)
                bias = bias if taps is None else taps("controller", first, bias)
                if "controller" in names:
                    found["controller", first] = bias
            hidden, left, here = self.stack._run(embedded, states[segment], _from_layer(taps, first), bias, names)
            after.append(left)
            found |= {(name, first + layer): value for (name, layer), value in here.items()}
        return hidden, None if state is None else self._join(after), found

    # The states of the segments: a tuple of stacked ones, or, for layers taken apart, in every layer's place such a tuple.

    def _segments(self, state: BackboneState) -> list[BackboneState]:
        apart = isinstance(self.stack.blocks, Unrolled)
        layers = zip(*state.layers, strict=True) if apart else state.layers
        return [state._replace(layers=of_segment) for of_segment in layers]

    def _join(self, states: list[Any]) -> BackboneState:
        layers = tuple(segment.layers for segment in states)
        apart = isinstance(self.stack.blocks, Unrolled)
        return states[0]._replace(layers=tuple(zip(*layers, strict=True)) if apart else layers)


def _from_layer(taps: Tap | None, first: int) -> Tap | None:
    return None if taps is None else lambda name, layer, value: taps(name, first + layer, value)
