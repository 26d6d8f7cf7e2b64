"""What moves information between positions, and the interface that all of it shares.

A mixer is attention, a state-space model, a convolution, a memory ...: everything in a layer that is not position-wise. Each is
one module with one configuration, and a backbone is made of them by letters (`calm.core.backbone`). None knows of layers, norms
or residuals; those belong to the block around it.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Precision


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
        """The window behind a block of `length` positions."""
        return self._replace(offset=self.offset + length)


class Fork(NamedTuple):
    """Where the branches of a forked state stand: a block of R positions is the next position of every branch.

    Branch r has read `ends[r]` positions of the sequence that was forked, its trunk, and `depth` of its own behind them.
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


@runtime_checkable
class MixerConfig(Protocol):
    """A frozen keyword-only dataclass that validates in `__post_init__`."""

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> Mixer: ...

    def parameters(self, dim: int) -> int:
        """Number of weights."""
        ...

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position in a sequence of `context` positions; a multiplication and an addition are two."""
        ...
