"""Modern Hopfield memory (Ramsauer et al. 2020, arXiv:2008.02217) as a mixer: a query falls towards the patterns it resembles.

The memory of patterns X has the energy

    E(q) = -log sum_m exp(beta x_m . q) / beta + |q|^2 / 2        (up to a constant)

and the update q' = X^T softmax(beta X q) never raises it (their theorem 1). One update is attention over the patterns; more of
them, refinements, let a query settle in a minimum. Patterns are learned slots, the same for every text, or the keys of the
positions read so far.

Mixture of recursions: the memory is read at every depth, after no refinement, one, two ..., and a gate that sees the hidden
state weighs the depths, position by position. How many depths there are is a layer's own affair, such as (3, 2, 2, 1). The name
is that of Bae et al. 2025 (arXiv:2507.10524), who route tokens through repeated layers; here the recursion is that of the
query, and soft: every depth is computed.

Symbols: the paper's state pattern xi is the query q, its stored patterns are the keys. A read takes the values that belong to
the keys, as in the paper's Hopfield layer; refinements go through the keys alone. Nothing here knows of positions: what
matters is what is stored, not where.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.attention import AttentionState, BranchKeys, ForkedState
from calm.core.dense import Dense, Precision, dense_flops, operand
from calm.core.mixer import Fork, MixerConfig, Window
from calm.errors import UsageError

_UNSEEN = -1e30  # a score that no softmax sees; not -inf, since a query inside left padding sees nothing at all
Scalar = float | Float[Array, ""]
Beta = float | Float[Array, "*heads"]


class Memory(NamedTuple):
    """Patterns and what a read of them gives. Leading axes follow those of the queries, or are left out where all share it.

    A memory with one axis more than the queries is one for each query.
    """

    keys: Float[Array, "... M C"]
    values: Float[Array, "... M C"]
    seen: Bool[Array, "... M"] | None = None
    """which patterns a query sees; none = all"""


# -- the update -------------------------------------------------------------------------------------------------------


def energy(query: Float[Array, "*b C"], patterns: Float[Array, "M C"], beta: Scalar) -> Float[Array, "*b"]:
    """E(q) of the module docstring."""
    return -jax.nn.logsumexp(beta * query @ patterns.T, axis=-1) / beta + jnp.sum(query**2, axis=-1) / 2


def refine(query: Float[Array, "R C"], patterns: Float[Array, "M C"], beta: Scalar) -> Float[Array, "R C"]:
    """One update: softmax(beta q X^T) X, which is attention of the queries over the patterns."""
    memory = (Memory(patterns, patterns),)
    return _mixed(associate(query, memory, beta, "float32"), [memory[0].keys], "float32")


def associate(
    query: Float[Array, "... R C"], memories: Sequence[Memory], beta: Beta, precision: Precision
) -> Float[Array, "... R _"]:
    """How much each query is drawn to each pattern of all memories, which stand one behind the other: a softmax, in float32."""
    scores = []
    for keys, _, seen in memories:
        own = keys.ndim > query.ndim
        found = _product("...rc,...mc->...rm", query[..., None, :] if own else query, keys, precision)
        found = jnp.asarray(beta)[..., None, None] * (found[..., 0, :] if own else found)
        # Masked last: a product with -1e30 is rounded one way in the softmax's maximum and another where it is subtracted.
        scores.append(found if seen is None else jnp.where(seen, found, _UNSEEN))
    return jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)


def read(
    query: Float[Array, "... R C"],
    memories: Sequence[Memory],
    beta: Beta,
    gate: Float[Array, "... R depths"],
    precision: Precision,
) -> Float[Array, "... R C"]:
    """Output of the memories for a query after 0, 1, ... refinements, each depth with its share of the gate."""
    depths = gate.shape[-1]
    weights = associate(query, memories, beta, precision)
    mixture = gate[..., :1] * weights
    for depth in range(1, depths):
        query = _mixed(weights, [memory.keys for memory in memories], precision)
        weights = associate(query, memories, beta, precision)
        mixture += gate[..., depth : depth + 1] * weights
    return _mixed(mixture, [memory.values for memory in memories], precision)


def _mixed(
    weights: Float[Array, "... R _"], parts: Sequence[Float[Array, "... _ C"]], precision: Precision
) -> Float[Array, "... R C"]:
    """The mean of patterns under the weights, over all parts."""
    borders = list(itertools.accumulate(part.shape[-2] for part in parts))[:-1]
    mixed = []
    for share, part in zip(jnp.split(weights, borders, axis=-1), parts, strict=True):
        own = part.ndim > weights.ndim
        found = _product("...rm,...mc->...rc", share[..., None, :] if own else share, part, precision)
        mixed.append(found[..., 0, :] if own else found)
    return sum(mixed[1:], start=mixed[0])


def _product(equation: str, one: Array, two: Array, precision: Precision) -> Array:
    one, two = operand(one, precision), operand(two, precision)
    if jax.default_backend() == "cpu":  # which refuses batched bfloat16 products of some shapes: rounded values, widened again
        one, two = one.astype(jnp.float32), two.astype(jnp.float32)
    return jnp.einsum(equation, one, two, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


# -- the mixer --------------------------------------------------------------------------------------------------------


@MixerConfig.register("H")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HopfieldConfig(MixerConfig):
    """A Hopfield memory of learned slots, or of the context."""

    memory: Literal["slots", "context"] = "slots"
    """what is stored: learned patterns, the same for every text; or one pattern for each position read so far"""
    num_slots: int = 64
    """patterns M of each head, where they are learned"""
    num_heads: int = 4
    """heads H, each a memory of its own of width C = D / H"""
    refinements: tuple[int, ...] = (1,)
    """depths of each layer, repeated over the layers: 1 reads once, without refining; 3 reads after 0, 1 and 2 refinements"""
    beta: float | None = None
    """inverse temperature; none = learned, one for each head, from 1 / sqrt(C)"""
    init_std: float | None = None
    """standard deviation of the kernels; none = 1 / sqrt(fan-in)"""

    def __post_init__(self) -> None:
        if self.memory not in ("slots", "context"):
            raise UsageError(f"hopfield: memory must be slots or context, got {self.memory!r}")
        if min(self.num_slots, self.num_heads) < 1:
            raise UsageError(f"hopfield: num_slots and num_heads must be at least 1, got {self.num_slots} and {self.num_heads}")
        if not self.refinements or min(self.refinements) < 1:
            raise UsageError(f"hopfield: refinements must be one or more depths of at least 1, got {self.refinements}")
        if self.beta is not None and not self.beta > 0:
            raise UsageError(f"hopfield: beta must be above 0, got {self.beta}")

    @property
    def max_depth(self) -> int:
        """The depths that are computed in every layer."""
        return max(self.refinements)

    def layer_constants(self, num_layers: int) -> Bool[np.ndarray, "layers depths"]:
        """The depths that each layer has."""
        counts = [self.refinements[layer % len(self.refinements)] for layer in range(num_layers)]
        return np.arange(self.max_depth) < np.array(counts)[:, None]

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Hopfield":
        kind = {"slots": SlotHopfield, "context": ContextHopfield}[self.memory]
        return kind(self, dim, rngs=rngs, precision=precision)

    def parameters(self, dim: int) -> int:
        """Number of weights."""
        gate = (dim + 1) * self.max_depth if self.max_depth > 1 else 0
        beta = self.num_heads if self.beta is None else 0
        stored = 2 * self.num_slots * dim if self.memory == "slots" else 2 * dim * dim
        return 2 * dim * dim + stored + gate + beta

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position after a context; depths that a layer does not have are computed and counted."""
        patterns = self.num_slots if self.memory == "slots" else context
        maps = dense_flops(dim, dim) * (2 if self.memory == "slots" else 4)
        gate = dense_flops(dim, self.max_depth) if self.max_depth > 1 else 0
        # Scores at every depth, a refinement between two, one read: each a product of a query with all patterns.
        return maps + gate + 2 * self.max_depth * dense_flops(dim, patterns)


class SlotState(NamedTuple):
    """Learned patterns remember nothing of a sequence."""


class Hopfield(nnx.Module):
    """Shared base of both memories: query, inverse temperature, gate over depths, output."""

    def __init__(self, config: HopfieldConfig, dim: int, *, rngs: nnx.Rngs, precision: Precision):
        if dim % config.num_heads:
            raise UsageError(f"hopfield: num_heads={config.num_heads} must divide dim={dim}")
        self.config, self.precision, self.head_dim = config, precision, dim // config.num_heads
        sizes = dict(init_std=config.init_std, precision=precision, rngs=rngs)
        start = jnp.full((config.num_heads,), -0.5 * np.log(self.head_dim), jnp.float32)
        self.log_beta = nnx.Param(start) if config.beta is None else None
        self.gate = Dense(dim, config.max_depth, use_bias=True, **sizes) if config.max_depth > 1 else None
        self.out = Dense(dim, dim, **sizes)

    @property
    def beta(self) -> Float[Array, "H"]:
        """The inverse temperature of each head."""
        if self.log_beta is not None:
            return jnp.exp(self.log_beta[...])
        assert self.config.beta is not None
        return jnp.full((self.config.num_heads,), self.config.beta, jnp.float32)

    def shares(self, hidden: Float[Array, "B N D"], depths: Bool[Array, "depths"] | None = None) -> Float[Array, "B N depths"]:
        """The gate: what share each depth has at each position; those that the layer does not have, none."""
        if self.gate is None:
            return jnp.ones((*hidden.shape[:-1], 1))
        logits = self.gate(hidden)
        return jax.nn.softmax(logits if depths is None else jnp.where(depths, logits, _UNSEEN), axis=-1)

    def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B H N C"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)

    def _recall(
        self,
        hidden: Float[Array, "B N D"],
        query: Float[Array, "B H N C"],
        memories: Sequence[Memory],
        depths: Bool[Array, "depths"] | None,
    ) -> Float[Array, "B N D"]:
        gate = self.shares(hidden, depths)[:, None]
        recalled = read(query, memories, self.beta, gate, self.precision)
        return self.out(recalled.swapaxes(1, 2).reshape(hidden.shape))


class SlotHopfield(Hopfield):
    """A memory of learned patterns: the same for every text and position, so that positions do not meet in it."""

    def __init__(self, config: HopfieldConfig, dim: int, *, rngs: nnx.Rngs, precision: Precision):
        super().__init__(config, dim, rngs=rngs, precision=precision)
        self.query = Dense(dim, dim, init_std=config.init_std, precision=precision, rngs=rngs)
        shape = (config.num_heads, config.num_slots, self.head_dim)
        self.keys = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.values = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> SlotState:
        return SlotState()

    def fork(self, state: SlotState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> SlotState:
        return state

    def rewind(self, state: SlotState, position: int | Int[Array, ""]) -> SlotState:
        return state

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        state: SlotState | None,
        window: Window | Fork,
        depths: Bool[Array, "depths"] | None = None,
    ) -> tuple[Float[Array, "B N D"], SlotState | None]:
        """`depths` says which refinements the layer has; none = all of them."""
        memory = Memory(self.keys[...], self.values[...])
        return self._recall(hidden, self._heads(self.query(hidden)), [memory], depths), state


class ContextHopfield(Hopfield):
    """A memory of the positions read so far, the present one among them. With one depth it is attention without positions.

    Its state is attention's.
    """

    def __init__(self, config: HopfieldConfig, dim: int, *, rngs: nnx.Rngs, precision: Precision):
        super().__init__(config, dim, rngs=rngs, precision=precision)
        self.qkv = Dense(dim, 3 * dim, init_std=config.init_std, precision=precision, rngs=rngs)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> AttentionState:
        """Room for `context` patterns; rewindable by nature."""
        on_cpu = jax.default_backend() == "cpu"  # as attention's, which says why
        dtype = jnp.bfloat16 if self.precision == "bfloat16" and not on_cpu else jnp.float32
        zeros = jnp.zeros((batch, self.config.num_heads, context, self.head_dim), dtype)
        return AttentionState(zeros, zeros)

    def fork(self, state: AttentionState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> ForkedState:
        """Branches after the first `ends[a]` positions each: the trunk is shared, each keeps its own patterns."""
        batch, heads, _, width = state.keys.shape
        own = jnp.zeros((batch, heads, len(ends) * num_branches, capacity, width), state.keys.dtype)
        return ForkedState(state, BranchKeys(own, own))

    def rewind(self, state: AttentionState, position: int | Int[Array, ""]) -> AttentionState:
        """The memory unchanged: what lies after the window's offset is not seen."""
        return state

    def __call__(
        self,
        hidden: Float[Array, "B N D"],
        state: AttentionState | ForkedState | None,
        window: Window | Fork,
        depths: Bool[Array, "depths"] | None = None,
    ) -> tuple[Float[Array, "B N D"], AttentionState | ForkedState | None]:
        """`depths` says which refinements the layer has; none = all of them."""
        query, key, value = map(self._heads, jnp.split(self.qkv(hidden), 3, axis=-1))
        # What is kept is rounded as products round it, so that a block that is read whole computes the same.
        key, value = (operand(x, self.precision) for x in (key, value))
        if isinstance(state, ForkedState):
            assert isinstance(window, Fork)
            own = BranchKeys(
                *(_put(old, x[:, :, :, None], window.depth) for old, x in zip(state.own, (key, value), strict=True))
            )
            state = ForkedState(state.trunk, own)
            on_trunk, on_own = window.masks(state.trunk.keys.shape[2], own.keys.shape[3])
            memories = [Memory(*state.trunk, on_trunk[:, :, 0]), Memory(*own, on_own)]
        else:
            assert isinstance(window, Window)
            if state is not None:
                state = AttentionState(_put(state.keys, key, window.offset), _put(state.values, value, window.offset))
                key, value = state
            memories = [Memory(key, value, window.mask(hidden.shape[1], key.shape[2]))]
        return self._recall(hidden, query, memories, depths), state


def _put(kept: Float[Array, "*b X C"], new: Float[Array, "*b Y C"], at: Int[Array, ""]) -> Float[Array, "*b X C"]:
    """The state with a block written at a position."""
    return jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), at, axis=kept.ndim - 2)
