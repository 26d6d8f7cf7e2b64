"""The interface of mixers, the parts of a layer that move information between positions.

Attention, a state-space model, a convolution and a memory are mixers. Each is one module with one configuration, registered
under a letter. Norms, residuals and layers belong to the block around it (`calm.core.transformer`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Precision
from calm.registry import Registered

Tap = Callable[[str, Any, Array], Array]
"""`(name, layer, value) -> value`: reads or replaces a value inside a backbone (`calm.hybrid.taps`)"""


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

    def after(self, length: int) -> "Window":
        """The window after a block of `length` positions."""
        return self._replace(offset=self.offset + length)


class Fork(NamedTuple):
    """Where the branches of a forked state stand: a block of R positions is the next position of every branch.

    Branch r has read `ends[r]` positions of the sequence that was forked, its trunk, and `depth` of its own after them.
    `starts` is that of the trunk.
    """

    ends: Int[Array, "R"]
    depth: Int[Array, ""]
    starts: Int[Array, "B"]

    def positions(self, length: int) -> Int[Array, "B R"]:
        return (self.ends + self.depth)[None, :] - self.starts[:, None]

    def masks(self, context: int, capacity: int) -> tuple[Bool[Array, "B 1 1 R P"], Bool[Array, "X"]]:
        """Which positions of the trunk each branch sees, and which of its own."""
        keys = jnp.arange(context)
        trunk = (keys < self.ends[:, None])[None] & (keys >= self.starts[:, None])[:, None]
        return trunk[:, None, None], jnp.arange(capacity) <= self.depth

    def after(self, length: int) -> "Fork":
        """Every branch has read one more position."""
        return self._replace(depth=self.depth + 1)


class LayerInputs(NamedTuple):
    """Inputs of a layer beside hidden states and mixers' states."""

    tap: Callable[[str, Array], Array] = lambda name, value: value
    """`(name, value) -> value`: a `Tap` of this layer"""
    bias: Float[Array, "B N P"] | None = None
    """added to the logits of the layer's gate over P paths"""
    constants: Mapping[str, Array] = {}
    """by letter: an array that is this layer's alone and no weight, passed to the mixer as a fourth argument"""


@runtime_checkable
class Mixer(Protocol):
    """A module `(hidden, state, window) -> (mixed, state)`, causal, in four equal modes: the whole sequence (no state), a block
    of positions, one step, and one step of many branches of a sequence.

    A state is a `NamedTuple` of arrays of fixed shape with a leading axis B, in float32 where it is a recurrence. Left padding
    (`Window.starts`) leaves no trace in it.
    """

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> Any:
        """The state before the first position, with room for `context` positions.

        A rewindable one also keeps what every position left, where that is not its nature, so that it can be forked and
        rewound.
        """
        ...

    def __call__(
        self, hidden: Float[Array, "B N D"], state: Any, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], Any]: ...

    def fork(self, state: Any, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Any:
        """The state of A * num_branches branches, those of one end beside each other, each as it was after the first
        `ends[a]` >= 1 positions; it goes where the state went, with a `Fork` for a window. `capacity` positions can be read.
        What branches share and never write is its field `trunk`, the rest `own`; without a trunk, all of it is theirs.
        """
        ...

    def rewind(self, state: Any, position: int | Int[Array, ""]) -> Any:
        """The state as it was after `position` positions, with as much room as before."""
        ...


class MixerConfig(Registered, family="mixer"):
    """Base of the mixers' configurations: frozen keyword-only dataclasses, each registered under a capital letter."""

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> Any:
        """The `Mixer` at model width D = `dim`."""
        raise NotImplementedError

    def parameters(self, dim: int) -> int:
        """Number of weights."""
        raise NotImplementedError

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position in a sequence of `context` positions; a multiplication and an addition are two."""
        raise NotImplementedError

    def layer_constants(self, num_layers: int) -> Any:
        """An array with a leading axis over the layers that hold this mixer, or None where they are all alike."""
        return None
