"""A selective state-space model as a mixer: a memory of fixed size that decides, position by position, what to keep and write.

After "Hybrid Hopfield-SSM Language Model" (J. Adam 2025: depthwise causal convolution, then a selective scan with a diagonal A
held stable by a log parametrisation and gates g_in and g_forget that depend on the input) and Mamba (Gu & Dao 2023,
arXiv:2312.00752). The diagonal of A is one number for all channels of a head, as in Mamba-2 (Dao & Gu 2024, arXiv:2405.21060),
so that whole chunks are matrix products (`calm.hybrid.scans`). Mamba ties writing to forgetting by one step size; here
each has its gate.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.mixer import Fork, MixerConfig, Window
from calm.errors import UsageError
from calm.hybrid.convolution import CausalConv, Tail, Trail, as_trail, present
from calm.hybrid.scans import CHUNK, selective_scan, states_after

MIN_DECAY = 1e-4  # a state loses at least this share a position, whatever the gates say: memories end, sums stay finite
RATE = 8.0  # forgetting of a wide open gate at initialisation: exp(-8) is left, 3 in 10,000
SPANS = (1.0, 1000.0)  # positions that the first and the last head remember at initialisation, the others between


class GateTrail(NamedTuple):
    """log a and g_in of every position so far, preallocated to the context P."""

    log_decay: Float[Array, "B P H"]
    gate_in: Float[Array, "B P H"]


class SSMState(NamedTuple):
    """State after a sequence: the convolution's last inputs and the memory. A rewindable one also keeps the inputs and gates of
    every position, about as much as keys and values; earlier memories are computed from them again.
    """

    conv: Tail | Trail
    memory: Float[Array, "B X H C"]
    gates: GateTrail | None


class BranchInputs(NamedTuple):
    """Own inputs of each of R branches, preallocated to Y positions: gated inputs, b, log decay since its end."""

    conv: Tail
    x: Float[Array, "B R Y H C"]
    b: Float[Array, "B R Y X"]
    log_decay: Float[Array, "B R Y H"]


class ForkedSSMState(NamedTuple):
    """The memories after A ends, each shared by the branches that leave there, and what the branches read of their own."""

    trunk: Float[Array, "B A X H C"]
    own: BranchInputs


@MixerConfig.register("S")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SSMConfig(MixerConfig):
    """A selective state-space model with `num_heads` decays."""

    state_dim: int = 32
    """numbers remembered per channel"""
    conv_kernel: int = 4
    """taps of the convolution before the scan"""
    expand: int = 2
    """inner width over model width"""
    num_heads: int = 8
    """groups of channels that forget together; divides the inner width"""

    def __post_init__(self) -> None:
        if min(self.state_dim, self.expand, self.num_heads) < 1 or self.conv_kernel < 2:
            raise UsageError("ssm: state_dim, expand and num_heads must be at least 1 and conv_kernel at least 2")

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "SelectiveSSM":
        return SelectiveSSM(dim, self, rngs=rngs, precision=precision)

    def inner_dim(self, dim: int) -> int:
        inner = self.expand * dim
        if inner % self.num_heads:
            raise UsageError(f"ssm: num_heads={self.num_heads} must divide the inner width {inner} (expand x dim)")
        return inner

    def parameters(self, dim: int) -> int:
        inner = self.inner_dim(dim)
        read = inner + 2 * self.state_dim
        small = 4 * self.num_heads + 2 * self.state_dim + inner  # biases of the gates, rates and skips; norms
        return dim * (inner + read + 2 * self.num_heads) + CausalConv.parameters(read, self.conv_kernel) + small + inner * dim

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position: the scan's are those of its chunks (`calm.hybrid.scans`)."""
        inner, chunk = self.inner_dim(dim), min(CHUNK, context)
        read = inner + 2 * self.state_dim
        into = dense_flops(dim, inner + read + 2 * self.num_heads) + CausalConv.flops(read, self.conv_kernel)
        scan = 2 * chunk * (self.state_dim + inner + self.num_heads) + 4 * self.state_dim * inner
        return into + scan + dense_flops(inner, dim)


class SelectiveSSM(nnx.Module):
    """h_t = a_t h_{t-1} + g_in_t b_t (x) x_t and out(norm((c_t . h_t + skip x_t) * SiLU(z_t))), head by head.

        a_t    = exp(-(exp(log_rate) g_forget_t + MIN_DECAY))          in (0, 1) whatever the weights and the input
        g_in, g_forget = sigmoid(linear map of the input + bias)       one each per head
        x, b, c = SiLU(conv(linear maps of the input)), b and c normed

    So |h| stays below the largest |b x| over 1 - exp(-MIN_DECAY). The norms of b and c, as in Jamba (Lieber et al. 2024,
    arXiv:2403.19887), make h linear in the scale of x. At initialisation the heads remember from SPANS[0] to SPANS[1]
    positions, and g_in = sqrt(1 - a^2), which gives each head's memory the same variance.
    """

    def __init__(self, dim: int, config: SSMConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        inner, heads, states = config.inner_dim(dim), config.num_heads, config.state_dim
        self.inner, self.num_heads, self.state_dim = inner, heads, states
        self.into = Dense(dim, 2 * inner + 2 * states + 2 * heads, precision=precision, rngs=rngs)
        self.conv = CausalConv(inner + 2 * states, config.conv_kernel, rngs=rngs)
        self.norm_b = nnx.RMSNorm(states, epsilon=1e-6, rngs=rngs)
        self.norm_c = nnx.RMSNorm(states, epsilon=1e-6, rngs=rngs)
        span = jnp.geomspace(*SPANS, heads)
        self.log_rate = nnx.Param(jnp.full((heads,), math.log(RATE), jnp.float32))
        self.forget_bias = nnx.Param(jax.scipy.special.logit(1 / (RATE * span)))
        self.in_bias = nnx.Param(jax.scipy.special.logit(jnp.sqrt(-jnp.expm1(-2 / span))))
        self.skip = nnx.Param(jnp.ones((heads,), jnp.float32))
        self.norm = nnx.RMSNorm(inner, epsilon=1e-6, rngs=rngs)
        self.out = Dense(inner, dim, precision=precision, rngs=rngs)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> SSMState:
        memory = jnp.zeros((batch, self.state_dim, self.num_heads, self.inner // self.num_heads), jnp.float32)
        nothing = jnp.zeros((batch, context, self.num_heads), jnp.float32)
        gates = GateTrail(nothing, nothing) if rewindable else None
        return SSMState(self.conv.init_state(batch, context, rewindable=rewindable), memory, gates)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: SSMState | ForkedSSMState | None, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], SSMState | ForkedSSMState | None]:
        """Without a state the block is the whole sequence; with one, the block continues what the state has read. With a forked
        state its positions are the next ones of as many branches.
        """
        here = present(window, hidden.shape[1])
        widths = (self.inner, self.inner + 2 * self.state_dim, self.num_heads)
        z, read, forget, write = jnp.split(self.into(hidden), [sum(widths[:i]) for i in (1, 2, 3)], axis=-1)
        log_decay = -(jnp.exp(self.log_rate[...]) * jax.nn.sigmoid(forget + self.forget_bias[...]) + MIN_DECAY)
        gate_in = jnp.where(here, jax.nn.sigmoid(write + self.in_bias[...]), 0.0)
        before = state.own.conv if isinstance(state, ForkedSSMState) else None if state is None else state.conv
        read, conv = self.conv(jnp.where(here, read, 0.0), before, window)
        x, b, c = self._parts(read)
        written = x * gate_in[..., None]

        if isinstance(state, ForkedSSMState):
            assert isinstance(window, Fork) and isinstance(conv, Tail)
            y, state = _branch_scan(written, log_decay, b, c, conv, state, window)
        else:
            y, memory = selective_scan(written, log_decay, b, c, None if state is None else state.memory)
            if state is not None:
                assert isinstance(window, Window) and conv is not None
                gates = None if state.gates is None else _store(state.gates, GateTrail(log_decay, gate_in), window)
                state = SSMState(conv, memory, gates)
        y = (y + self.skip[...][:, None] * x).reshape(z.shape)
        return self.out(self.norm(y * jax.nn.silu(z))), state

    def _parts(self, read: Float[Array, "*b I"]) -> tuple[Float[Array, "*b H C"], Float[Array, "*b X"], Float[Array, "*b X"]]:
        """x, b and c of convolved inputs."""
        x, b, c = jnp.split(jax.nn.silu(read), [self.inner, self.inner + self.state_dim], axis=-1)
        return x.reshape(*x.shape[:-1], self.num_heads, -1), self.norm_b(b), self.norm_c(c) * self.state_dim**-0.5

    def fork(self, state: SSMState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> ForkedSSMState:
        """One memory for each end, computed from what the positions left; the branches of one end share it."""
        trunk = self._memories(state, ends)
        shape = (trunk.shape[0], len(ends) * num_branches, capacity)
        heads, width = trunk.shape[-2:]
        own = BranchInputs(
            self.conv.fork(state.conv, ends, num_branches),
            jnp.zeros((*shape, heads, width), jnp.float32),
            jnp.zeros((*shape, self.state_dim), jnp.float32),
            jnp.zeros((*shape, heads), jnp.float32),
        )
        return ForkedSSMState(trunk, own)

    def rewind(self, state: SSMState, position: int | Int[Array, ""]) -> SSMState:
        """The memory is computed again; of the rest, where the next block stands says what came before it."""
        return state._replace(memory=self._memories(state, jnp.asarray(position)[None])[:, 0])

    def _memories(self, state: SSMState, ends: Int[Array, "A"]) -> Float[Array, "B A X H C"]:
        trail = as_trail(state.conv)
        assert state.gates is not None
        x, b, _ = self._parts(self.conv.over(trail.inputs))
        return states_after(x * state.gates.gate_in[..., None], state.gates.log_decay, b, ends)


def _store(trail: GateTrail, block: GateTrail, window: Window) -> GateTrail:
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, window.offset, axis=1), trail, block)


def _branch_scan(
    written: Float[Array, "B R H C"],
    log_decay: Float[Array, "B R H"],
    b: Float[Array, "B R X"],
    c: Float[Array, "B R X"],
    conv: Tail,
    state: ForkedSSMState,
    fork: Fork,
) -> tuple[Float[Array, "B R H C"], ForkedSSMState]:
    """Each branch reads the memory after its end, decayed since, and, as in a chunk of `selective_scan`, its own positions."""
    trunk, own = state
    at = jax.lax.dynamic_update_slice_in_dim
    before = jax.lax.dynamic_index_in_dim(own.log_decay, jnp.maximum(fork.depth - 1, 0), axis=2, keepdims=False)
    since = jnp.where(fork.depth > 0, before, 0.0) + log_decay  # [B R H]: from the end of the trunk to after this position
    own = BranchInputs(
        conv,
        at(own.x, written[:, :, None], fork.depth, axis=2),
        at(own.b, b[:, :, None], fork.depth, axis=2),
        at(own.log_decay, since[:, :, None], fork.depth, axis=2),
    )
    seen = (jnp.arange(own.x.shape[2]) <= fork.depth)[:, None]
    decay = jnp.exp(jnp.where(seen, since[:, :, None] - own.log_decay, -jnp.inf))  # [B R Y H]
    products = dict(preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    y = jnp.einsum("brx,bryx,bryh,bryhc->brhc", c, own.b, decay, own.x, **products)
    of_end = c.reshape(c.shape[0], trunk.shape[1], -1, c.shape[-1])  # [B A S X]
    from_trunk = jnp.einsum("basx,baxhc->bashc", of_end, trunk, **products).reshape(written.shape)
    return y + jnp.exp(since)[..., None] * from_trunk, ForkedSSMState(trunk, own)
