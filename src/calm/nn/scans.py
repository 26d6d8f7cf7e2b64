"""Linear recurrences h_t = a_t h_{t-1} + b_t over a sequence, without a loop of the host over time.

`linear_scan` is the recurrence itself, element by element. `selective_scan` is the one of a state-space model, whose states are
products of two vectors and far larger than its inputs: it never forms them. With one decay for all channels of a head, the outputs
of a short chunk are a masked product of its own inputs, and only the states between chunks are carried on (state-space duality:
Dao & Gu 2024, arXiv:2405.21060, section 6). On a CPU that is several times faster than carrying the state from position to
position, and nearly all of it is matrix products (docs/log.md).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.errors import UsageError

ScanMethod = Literal["sequential", "associative"]
METHODS: tuple[ScanMethod, ...] = ("sequential", "associative")
CHUNK = 32  # positions; measured between 16 and 128 (docs/log.md)

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def linear_scan(
    decay: Float[Array, "N ..."],
    inputs: Float[Array, "N ..."],
    initial: Float[Array, "..."] | None = None,
    *,
    method: ScanMethod | None = None,
) -> Float[Array, "N ..."]:
    """h_t = decay_t * h_{t-1} + inputs_t for every t of the leading axis, from h = `initial` (zero without one).

    `decay` broadcasts against `inputs`. By default the steps follow each other on a CPU and form a tree elsewhere
    (Blelloch 1990): the tree has log N levels but moves every state several times.
    """
    if method is None:
        method = "sequential" if jax.default_backend() == "cpu" else "associative"
    if method not in METHODS:
        raise UsageError(f"unknown scan method {method!r}; choose one of {', '.join(METHODS)}")
    initial = jnp.zeros_like(inputs[0]) if initial is None else initial
    if method == "sequential":

        def step(state: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            state = now[0] * state + now[1]
            return state, state

        return jax.lax.scan(step, initial, (decay, inputs))[1]

    def join(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    inputs = jnp.concatenate([(decay[0] * initial + inputs[0])[None], inputs[1:]])
    return jax.lax.associative_scan(join, (decay, inputs))[1]


def selective_scan(
    x: Float[Array, "B N H C"],
    log_decay: Float[Array, "B N H"],
    b: Float[Array, "B N X"],
    c: Float[Array, "B N X"],
    initial: Float[Array, "B X H C"] | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B N H C"], Float[Array, "B X H C"]]:
    """y_t = c_t . h_t with h_t = exp(log_decay_t) h_{t-1} + b_t (x) x_t, and the last state. X is the width of a state.

    Attention with a decay for a mask, chunk by chunk: c are queries, b keys, x values. Within a chunk y = (L * c b^T) x, where
    L[i, j] is the decay between j and i; what came before the chunk enters through the state at its beginning. Every exponent
    is a sum of log decays, so none is above zero and nothing overflows. `plain_selective_scan` is the same by the book.
    """
    batch, length, heads, width = x.shape
    x, log_decay, b, c = (in_chunks(z, min(chunk, length)) for z in (x, log_decay, b, c))
    total = _running_sum(log_decay)  # [B n Q H]: the log decay from the beginning of the chunk to behind position i
    earlier = jnp.tril(jnp.ones((x.shape[2],) * 2, bool))
    by_head = total.swapaxes(2, 3)
    between = jnp.exp(jnp.where(earlier, by_head[..., :, None] - by_head[..., None, :], -jnp.inf))  # [B n H Q Q]
    y = _dot("bnhij,bnjhc->bnihc", between * _dot("bnix,bnjx->bnij", c, b)[:, :, None], x)

    states = _chunk_states(x, total, b, initial)
    flat = states[:, :-1].reshape(*states[:, :-1].shape[:3], heads * width)
    y += jnp.exp(total)[..., None] * _dot("bnix,bnxe->bnie", c, flat).reshape(y.shape)
    return y.reshape(batch, -1, heads, width)[:, :length], states[:, -1]


def plain_selective_scan(
    x: Float[Array, "B N H C"],
    log_decay: Float[Array, "B N H"],
    b: Float[Array, "B N X"],
    c: Float[Array, "B N X"],
    initial: Float[Array, "B X H C"] | None = None,
    *,
    method: ScanMethod | None = None,
) -> tuple[Float[Array, "B N H C"], Float[Array, "B X H C"]]:
    """`selective_scan` with a state for every position: the reference, N times its memory."""
    decay = jnp.exp(log_decay).swapaxes(0, 1)[:, :, None, :, None]
    states = linear_scan(decay, jnp.einsum("bnx,bnhc->nbxhc", b, x), initial, method=method)
    return jnp.einsum("bnx,nbxhc->bnhc", c, states), states[-1]


def states_after(
    x: Float[Array, "B N H C"],
    log_decay: Float[Array, "B N H"],
    b: Float[Array, "B N X"],
    ends: Int[Array, "A"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B A X H C"]:
    """The states of `selective_scan` behind the first `ends[a]` positions each, 0 to N; what follows them is not looked at."""
    size = min(chunk, x.shape[1])
    x, log_decay, b = (in_chunks(z, size) for z in (x, log_decay, b))
    total = _running_sum(log_decay)
    whole, rest = ends // size, ends % size
    base = _chunk_states(x, total, b, None)[:, whole]
    last = jnp.minimum(whole, x.shape[1] - 1)
    x, total, b = x[:, last], total[:, last], b[:, last]  # [B A Q ...]: the chunk in which each end lies
    upto = jnp.where(rest[:, None] > 0, jnp.take_along_axis(total, (jnp.maximum(rest, 1) - 1)[None, :, None, None], 2)[:, :, 0], 0.0)
    inside = (jnp.arange(size) < rest[:, None])[..., None]
    weights = jnp.exp(jnp.where(inside, upto[:, :, None] - total, -jnp.inf))
    read = _dot("baqx,baqe->baxe", b, (x * weights[..., None]).reshape(*x.shape[:3], -1))
    return jnp.exp(upto)[:, :, None, :, None] * base + read.reshape(base.shape)


def in_chunks(z: Float[Array, "B N ..."], size: int) -> Float[Array, "B n Q ..."]:
    """Cut into chunks of `size` positions; zeros fill the last one. A log decay of zero and no input leave a state as it is."""
    missing = -z.shape[1] % size
    z = jnp.pad(z, ((0, 0), (0, missing)) + ((0, 0),) * (z.ndim - 2))
    return z.reshape(z.shape[0], -1, size, *z.shape[2:])


def _running_sum(z: Float[Array, "B n Q H"]) -> Float[Array, "B n Q H"]:
    """Sums along a chunk, as a product: a CPU computes a cumulative sum again in every loop that reads it."""
    return _dot("ij,bnjh->bnih", jnp.tril(jnp.ones((z.shape[2],) * 2)), z)


def _chunk_states(
    x: Float[Array, "B n Q H C"], total: Float[Array, "B n Q H"], b: Float[Array, "B n Q X"], initial: Float[Array, "B X H C"] | None
) -> Float[Array, "B m X H C"]:
    """The state before every chunk and the one behind the last, m = n + 1."""
    batch, chunks, _, heads, width = x.shape
    kept = jnp.exp(total[:, :, -1:] - total)[..., None]  # what is left at the end of the chunk of what a position wrote
    written = _dot("bnjx,bnje->bnxe", b, (x * kept).reshape(*x.shape[:3], -1)).reshape(batch, chunks, -1, heads, width)
    initial = jnp.zeros_like(written[:, 0]) if initial is None else initial
    decay = jnp.exp(total[:, :, -1]).swapaxes(0, 1)[:, :, None, :, None]
    behind = linear_scan(decay, written.swapaxes(0, 1), initial)
    return jnp.concatenate([initial[None], behind]).swapaxes(0, 1)
