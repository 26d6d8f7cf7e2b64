"""A gated recurrent unit as a mixer (Cho et al. 2014, arXiv:1406.1078): the recurrent baseline of the memory tasks.

Its state depends on the state before it through a matrix and a nonlinearity, so its positions follow each other everywhere:
no tree and no chunks. What can be done for all positions at once is done so: the products with the input before the loop, and
in the backward pass the gradient of the recurrent matrix after it.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import Dense, Precision, dense_flops, operand, product, product_with_transpose, weight_gradient
from calm.core.mixer import Fork, MixerConfig, Window
from calm.errors import UsageError
from calm.hybrid.convolution import present


class GRUState(NamedTuple):
    """The memory of a row, or of each of its branches."""

    memory: Float[Array, "B *R I"]


class GRUTrail(NamedTuple):
    """The memories after 0, 1, 2 ... positions, preallocated to the context."""

    memories: Float[Array, "B P I"]


@MixerConfig.register("G")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GRUConfig(MixerConfig):
    """One gated recurrent unit between two linear maps."""

    width: int | None = None
    """numbers remembered; none = the model width"""

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise UsageError(f"gru: width must be at least 1, got {self.width}")

    def build(self, dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "GRU":
        return GRU(dim, self, rngs=rngs, precision=precision)

    def parameters(self, dim: int) -> int:
        width = self.width or dim
        return 3 * width * (dim + width) + 4 * width + width * dim

    def flops(self, dim: int, context: int) -> int:
        """Forward FLOPs of one position: the same in every context."""
        width = self.width or dim
        return dense_flops(dim, 3 * width) + dense_flops(width, 3 * width) + dense_flops(width, dim)


class GRU(nnx.Module):
    """h_t = u h_{t-1} + (1 - u) tanh(n_x + r * (n_h + bias)), with update u and reset r = sigmoid of what x and h_{t-1} give.

    The reset gate stands after the recurrent product, not before it as in the paper: one product a step in place of two, as in
    the usual fast implementations. |h| < 1 whatever the input.
    """

    def __init__(self, dim: int, config: GRUConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.width, self.precision = config.width or dim, precision
        self.into = Dense(dim, 3 * self.width, use_bias=True, precision=precision, rngs=rngs)
        self.recurrent = Dense(self.width, 3 * self.width, precision=precision, rngs=rngs)
        self.reset_bias = nnx.Param(jnp.zeros((self.width,), jnp.float32))
        self.out = Dense(self.width, dim, precision=precision, rngs=rngs)

    def init_state(self, batch: int, context: int, *, rewindable: bool = False) -> GRUState | GRUTrail:
        if rewindable:
            return GRUTrail(jnp.zeros((batch, context + 1, self.width), jnp.float32))
        return GRUState(jnp.zeros((batch, self.width), jnp.float32))

    def __call__(
        self, hidden: Float[Array, "B N D"], state: GRUState | GRUTrail | None, window: Window | Fork
    ) -> tuple[Float[Array, "B N D"], GRUState | GRUTrail | None]:
        """Without a state the block is the whole sequence; with one, the block continues what the state has read. With the
        memories of branches its positions are the next ones of as many branches.
        """
        batch, length, _ = hidden.shape
        inputs, here = self.into(hidden), present(window, length)
        if isinstance(window, Fork):
            assert isinstance(state, GRUState)
            inputs, here = inputs.reshape(1, batch * length, -1), here.reshape(1, -1, 1)
            first = state.memory.reshape(-1, self.width)
        else:
            inputs, here = inputs.swapaxes(0, 1), here.swapaxes(0, 1)
            if isinstance(state, GRUTrail):
                first = jax.lax.dynamic_index_in_dim(state.memories, window.offset, axis=1, keepdims=False)
            else:
                first = jnp.zeros((batch, self.width), jnp.float32) if state is None else state.memory
        memories = gru_scan(inputs, here, first, self.recurrent.kernel[...], self.reset_bias[...], self.precision)
        if isinstance(window, Fork):
            memories = memories.reshape(batch, length, self.width)
            return self.out(memories), GRUState(memories)
        memories = memories.swapaxes(0, 1)
        if isinstance(state, GRUTrail):
            state = GRUTrail(jax.lax.dynamic_update_slice_in_dim(state.memories, memories, window.offset + 1, axis=1))
        elif state is not None:
            state = GRUState(memories[:, -1])
        return self.out(memories), state

    def fork(self, state: GRUState | GRUTrail, ends: Int[Array, "A"], num_branches: int, capacity: int) -> GRUState:
        return GRUState(jnp.repeat(_as_trail(state).memories[:, ends], num_branches, axis=1))

    def rewind(self, state: GRUState | GRUTrail, position: int | Int[Array, ""]) -> GRUTrail:
        """The state as it is: where the next block stands says which memory it continues."""
        return _as_trail(state)


def _as_trail(state: GRUState | GRUTrail) -> GRUTrail:
    if not isinstance(state, GRUTrail):
        raise UsageError("only a rewindable state can be forked or rewound: init_state(..., rewindable=True)")
    return state


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def gru_scan(
    inputs: Float[Array, "N B J"],
    here: Bool[Array, "N B 1"],
    first: Float[Array, "B I"],
    kernel: Float[Array, "I J"],
    bias: Float[Array, "I"],
    precision: Precision,
) -> Float[Array, "N B I"]:
    """The memories after every position, from `first`; `inputs` and the columns of `kernel` are those of u, r and n.

    Positions that are not `here` leave the memory as it is.
    """

    def step(memory: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        u, _, n, _ = _gates(now[0], product(operand(memory, precision), rounded), bias)
        memory = jnp.where(now[1], u * memory + (1 - u) * n, memory)
        return memory, memory

    rounded = operand(kernel, precision)
    return jax.lax.scan(step, first, (inputs, here))[1]


def _gates(inputs: Float[Array, "*b J"], recurrent: Float[Array, "*b J"], bias: Float[Array, "I"]) -> tuple[Array, ...]:
    """u, r, n and what r multiplies."""
    (u, r, n), (u_h, r_h, n_h) = jnp.split(inputs, 3, axis=-1), jnp.split(recurrent, 3, axis=-1)
    u, r, inner = jax.nn.sigmoid(u + u_h), jax.nn.sigmoid(r + r_h), n_h + bias
    return u, r, jnp.tanh(n + r * inner), inner


def _gru_forward(
    inputs: Array, here: Array, first: Array, kernel: Array, bias: Array, precision: Precision
) -> tuple[Array, tuple[Array, ...]]:
    memories = gru_scan(inputs, here, first, kernel, bias, precision)
    return memories, (inputs, here, first, kernel, bias, memories)


def _gru_backward(
    precision: Precision, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, None, Array, Array, Array]:
    """With the memories known, the gates of all positions are one product; the loop back is left with one product a step."""
    inputs, here, first, kernel, bias, memories = residuals
    before = jnp.concatenate([first[None], memories[:-1]])
    rows, rounded = operand(before.reshape(-1, before.shape[-1]), precision), operand(kernel, precision)
    u, r, n, inner = _gates(inputs, product(rows, rounded).reshape(inputs.shape), bias)
    # What a gradient of the memory after a position means for what goes into each gate, and for the memory before it.
    to_u = jnp.where(here, (before - n) * u * (1 - u), 0.0)
    to_n = jnp.where(here, (1 - u) * (1 - n**2), 0.0)
    to_r, kept = to_n * inner * r * (1 - r), jnp.where(here, u, 1.0)
    to_recurrent = jnp.concatenate([to_u, to_r, to_n * r], axis=-1)

    def step(later: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        gradient, to_recurrent, kept = now
        gradient += later
        back = product_with_transpose(operand(jnp.tile(gradient, 3) * to_recurrent, precision), rounded)
        return kept * gradient + back, gradient

    of_first, gradient = jax.lax.scan(step, jnp.zeros_like(first), (gradient, to_recurrent, kept), reverse=True)
    of_recurrent = jnp.tile(gradient, 3) * to_recurrent
    of_kernel = weight_gradient(rows, operand(of_recurrent.reshape(rows.shape[0], -1), precision))
    of_inputs = jnp.tile(gradient, 3) * jnp.concatenate([to_u, to_r, to_n], axis=-1)
    return of_inputs, None, of_first, of_kernel, (gradient * to_n * r).sum((0, 1))


gru_scan.defvjp(_gru_forward, _gru_backward)
