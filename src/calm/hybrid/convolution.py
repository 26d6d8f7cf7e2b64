"""Causal depthwise convolution as a mixer: what a channel reads is its own last few positions.

The shortest memory that moves anything at all: a state-space model whose impulse response is finite. The latent models of
"Hybrid CALM-on-Z" (J. Adam 2025) put it under a Hopfield memory, with a kernel of 7.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.mixer import Fork, MixerConfig, Window
from calm.errors import UsageError


class Tail(NamedTuple):
    """The last W - 1 inputs of a convolution of W taps: of a row, or, with an axis of branches, of each branch."""

    inputs: Float[Array, "B *R W I"]


class Trail(NamedTuple):
    """All inputs so far, after W - 1 zeros and preallocated to the context: the tail at any position is a slice of it."""

    inputs: Float[Array, "B P I"]


class CausalConv(nnx.Module):
    """y_t = bias + sum_k kernel_k * x_{t - (W-1) + k}, every channel alone; before a row begins there are zeros.

    Written as W shifted products, which compile into one loop over the block: the general convolution of a CPU backend is many
    times slower for one channel a group (docs/log.md).
    """

    def __init__(self, width: int, kernel: int, *, rngs: nnx.Rngs):
        self.reach = kernel - 1
        self.kernel = nnx.Param(kernel**-0.5 * jax.random.normal(rngs.params(), (kernel, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def init_state(self, batch: int, context: int, *, rewindable: bool) -> Tail | Trail:
        width = self.bias[...].shape[0]
        if rewindable:
            return Trail(jnp.zeros((batch, context + self.reach, width), jnp.float32))
        return Tail(jnp.zeros((batch, self.reach, width), jnp.float32))

    def __call__(
        self, x: Float[Array, "B N I"], state: Tail | Trail | None, window: Window | Fork
    ) -> tuple[Float[Array, "B N I"], Tail | Trail | None]:
        """`x` must be zero in left padding. With a `Fork` and the tails of its branches, N is the branches."""
        reach = self.reach
        if isinstance(window, Fork):
            assert isinstance(state, Tail)
            seen = jnp.concatenate([state.inputs, x[:, :, None]], axis=2)
            return jnp.einsum("brwi,wi->bri", seen, self.kernel[...]) + self.bias[...], Tail(seen[:, :, 1:])
        if state is None:
            seen = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        elif isinstance(state, Tail):
            seen = jnp.concatenate([state.inputs, x], axis=1)
            state = Tail(seen[:, x.shape[1] :])
        else:
            tail = jax.lax.dynamic_slice_in_dim(state.inputs, window.offset, reach, axis=1)
            seen = jnp.concatenate([tail, x], axis=1)
            state = Trail(jax.lax.dynamic_update_slice_in_dim(state.inputs, x, window.offset + reach, axis=1))
        return self.over(seen), state

    def over(self, seen: Float[Array, "B P I"]) -> Float[Array, "B N I"]:
        """The outputs at all positions of `seen` that have W - 1 before them."""
        return shifted_products(seen, self.kernel[...]) + self.bias[...]

    def fork(self, state: Tail | Trail, ends: Int[Array, "A"], num_branches: int) -> Tail:
        """The tails after the first `ends[a]` positions, once for each branch."""
        trail = as_trail(state)
        at = ends[:, None] + jnp.arange(self.reach)
        return Tail(jnp.repeat(trail.inputs[:, at], num_branches, axis=1))

    @staticmethod
    def parameters(width: int, kernel: int) -> int:
        return (kernel + 1) * width

    @staticmethod
    def flops(width: int, kernel: int) -> int:
        """Forward FLOPs of one position."""
        return 2 * kernel * width


FOLDS = 16


@jax.custom_vjp
def shifted_products(seen: Float[Array, "B P I"], kernel: Float[Array, "W I"]) -> Float[Array, "B N I"]:
    """y_t = sum_k kernel_k * seen_{t+k}, N = P - W + 1: `jax.lax.conv_general_dilated` with a group for each channel."""
    length = seen.shape[1] - kernel.shape[0] + 1
    return sum((tap * seen[:, k : k + length] for k, tap in enumerate(kernel)), jnp.zeros((), seen.dtype))


def _shifted_forward(seen: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return shifted_products(seen, kernel), (seen, kernel)


def _shifted_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """The gradient of what was seen is one convolution more. That of a tap is a sum over all positions: a CPU walks such a sum
    across memory, so the positions are first folded upon each other, which it does along memory.
    """
    (seen, kernel), (batch, length, width), reach = residuals, dy.shape, residuals[1].shape[0] - 1
    dseen = shifted_products(jnp.pad(dy, ((0, 0), (reach, reach), (0, 0))), kernel[::-1])
    missing = -length % FOLDS
    dy, seen = (jnp.pad(z, ((0, 0), (0, missing), (0, 0))) for z in (dy, seen))
    fold = (length + missing) // FOLDS

    def tap(k: int) -> Array:
        parts = (dy[:, at : at + fold] * seen[:, at + k : at + k + fold] for at in range(0, fold * FOLDS, fold))
        return sum(parts, jnp.zeros((batch, fold, width), dy.dtype)).sum((0, 1))

    return dseen, jnp.stack([tap(k) for k in range(reach + 1)])


shifted_products.defvjp(_shifted_forward, _shifted_backward)


def as_trail(state: Tail | Trail) -> Trail:
    if not isinstance(state, Trail):
        raise UsageError("only a rewindable state can be forked or rewound: init_state(..., rewindable=True)")
    return state


def present(window: Window | Fork, length: int) -> Bool[Array, "B N 1"]:
    """Which positions of a block are their row's own and not left padding; a branch's own always are."""
    if isinstance(window, Fork):
        return jnp.ones((window.starts.shape[0], length, 1), bool)
    return (window.positions(length) >= 0)[..., None]


@MixerConfig.register("C")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvSSMConfig(MixerConfig):
    """Depthwise causal convolution under an output gate."""

    kernel: int = 7
    """taps: a position reads itself and the `kernel` - 1 before it"""
    expand: int = 1
    """inner width over model width"""

    def __post_init__(self) -> None:
        if self.kernel < 2 or self.expand < 1:
            raise UsageError(
                f"conv: kernel must be at least 2 and expand at least 1, got kernel={self.kernel}, expand={self.expand}"
            )

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "ConvSSM":
        return ConvSSM(dim, self, rngs=rngs, precision=precision)

    def parameters(self, dim: int) -> int:
        inner = self.expand * dim
        return 3 * dim * inner + CausalConv.parameters(inner, self.kernel)

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position: the same in every context."""
        inner = self.expand * dim
        return dense_flops(dim, 2 * inner) + CausalConv.flops(inner, self.kernel) + dense_flops(inner, dim)


class ConvSSM(nnx.Module):
    """out(SiLU(conv(x W_x)) * SiLU(x W_z)). The state is the convolution's last W - 1 inputs."""

    def __init__(self, dim: int, config: ConvSSMConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        inner = config.expand * dim
        self.into = Dense(dim, 2 * inner, precision=precision, rngs=rngs)
        self.conv = CausalConv(inner, config.kernel, rngs=rngs)
        self.out = Dense(inner, dim, precision=precision, rngs=rngs)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> Tail | Trail:
        return self.conv.init_state(batch, context, rewindable=rewindable)

    def __call__(
        self, hidden: Float[Array, "B N D"], state: Tail | Trail | None, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], Tail | Trail | None]:
        """Without a state the block is the whole sequence; with one, the block continues what the state has read."""
        x, gate = jnp.split(self.into(hidden), 2, axis=-1)
        x, state = self.conv(jnp.where(present(window, x.shape[1]), x, 0.0), state, window)
        return self.out(jax.nn.silu(x) * jax.nn.silu(gate)), state

    def fork(self, state: Tail | Trail, ends: Int[Array, "A"], num_branches: int, capacity: int) -> Tail:
        return self.conv.fork(state, ends, num_branches)

    def rewind(self, state: Tail | Trail, position: int | Int[Array, ""]) -> Trail:
        """The state as it is: where the next block stands says which inputs came before it."""
        return as_trail(state)
