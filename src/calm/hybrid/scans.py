"""Linear recurrences h_t = a_t h_{t-1} + b_t over a sequence, without a loop of the host over time.

`linear_scan` is the recurrence itself, element by element. `selective_scan` is the one of a state-space model, whose states
are products of two vectors and far larger than its inputs: it never forms them. With one decay for all channels of a head, the
outputs of a short chunk are a masked product of its own inputs, and only the states between chunks are carried on (state-space
duality: Dao & Gu 2024, arXiv:2405.21060, section 6). On a CPU that is several times faster than carrying the state from
position to position (docs/log.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.errors import UsageError

METHODS = ("sequential", "associative")
CHUNK = 32  # positions; measured between 16 and 128 (docs/log.md)

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def linear_scan(
    decay: Float[Array, "N ..."],
    inputs: Float[Array, "N ..."],
    initial: Float[Array, "..."] | None = None,
    *,
    method: str | None = None,
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
    if initial is None:
        initial = jnp.zeros((batch, b.shape[-1], heads, width), jnp.float32)
    y, last = _scan_chunks(*(in_chunks(z, min(chunk, length)) for z in (x, log_decay, b, c)), initial)
    return y.reshape(batch, -1, heads, width)[:, :length], last


@jax.custom_vjp
def _scan_chunks(x: Array, log_decay: Array, b: Array, c: Array, initial: Array) -> tuple[Array, Array]:
    return _scan_forward(x, log_decay, b, c, initial)[0]


def _scan_forward(
    x: Float[Array, "B n Q H C"],
    log_decay: Float[Array, "B n Q H"],
    b: Float[Array, "B n Q X"],
    c: Float[Array, "B n Q X"],
    initial: Float[Array, "B X H C"],
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    total = _running_sum(log_decay)  # [B n Q H]: the log decay from the beginning of the chunk to after position i
    inside = _decay_between(total) * _dot("bnix,bnjx->bnij", c, b)[:, :, None]
    y = _by_head(_dot("bnhij,bnhjc->bnhic", inside, _by_head(x)))
    states = _chunk_states(x, total, b, initial)
    y += jnp.exp(total)[..., None] * _dot("bnix,bnxe->bnie", c, _flat(states[:, :-1])).reshape(y.shape)
    return (y, states[:, -1]), (x, total, b, c, states, y)


def _scan_backward(residuals: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, ...]:
    """The same scan from the end, with queries and keys exchanged.

    The gradient of the log decays needs no product of its own. y_i holds exp(s_i - s_j) x_j, s being their running sum: so s_i
    gets dy_i . y_i - dx_i . x_i, and log_decay_t the sum of these from t on (Yang et al. 2023, arXiv:2312.06635). We sum to the
    end of the chunk only: all that follows it amounts to the product of the state there with its gradient.
    """
    (x, total, b, c, states, y), (dy, dlast) = residuals, gradients
    between, since = _decay_between(total), jnp.exp(total)[..., None]
    kept = jnp.exp(total[:, :, -1:] - total)[..., None]
    read = _flat(dy * since)
    # What the outputs of a chunk ask of the state before it; carried on, the gradients of the states before every chunk.
    direct = _dot("bnix,bnie->bnxe", c, read).reshape(states[:, 1:].shape)
    decay = _chunk_decay(total)[::-1]
    carried = linear_scan(decay, direct.swapaxes(0, 1)[::-1], dlast)[::-1]
    dstates = jnp.concatenate([carried[1:], dlast[None]]).swapaxes(0, 1)

    dy_by_head = _by_head(dy)
    inside = between.swapaxes(3, 4) * _dot("bnjx,bnix->bnji", b, c)[:, :, None]
    dx = _by_head(_dot("bnhji,bnhic->bnhjc", inside, dy_by_head))
    dx += kept * _dot("bnjx,bnxe->bnje", b, _flat(dstates)).reshape(x.shape)
    dproducts = (_dot("bnhic,bnhjc->bnhij", dy_by_head, _by_head(x)) * between).sum(2)
    db = _dot("bnij,bnix->bnjx", dproducts, c) + _dot("bnje,bnxe->bnjx", _flat(x * kept), _flat(dstates))
    dc = _dot("bnij,bnjx->bnix", dproducts, b) + _dot("bnie,bnxe->bnix", read, _flat(states[:, :-1]))
    dtotal = (dy * y - dx * x).sum(-1)
    dlog_decay = _dot("ij,bnih->bnjh", jnp.tril(jnp.ones((x.shape[2],) * 2)), dtotal)
    dlog_decay += (dstates * states[:, 1:]).sum((2, 4))[:, :, None]
    return dx, dlog_decay, db, dc, carried[0]


_scan_chunks.defvjp(_scan_forward, _scan_backward)


def plain_selective_scan(
    x: Float[Array, "B N H C"],
    log_decay: Float[Array, "B N H"],
    b: Float[Array, "B N X"],
    c: Float[Array, "B N X"],
    initial: Float[Array, "B X H C"] | None = None,
    *,
    method: str | None = None,
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
    """The states of `selective_scan` after the first `ends[a]` positions each, 0 to N; what follows them is not looked at."""
    size = min(chunk, x.shape[1])
    x, log_decay, b = (in_chunks(z, size) for z in (x, log_decay, b))
    total = _running_sum(log_decay)
    whole, rest = ends // size, ends % size
    states = _chunk_states(x, total, b, jnp.zeros((x.shape[0], b.shape[-1], *x.shape[3:]), jnp.float32))
    base = states[:, whole]
    last = jnp.minimum(whole, x.shape[1] - 1)
    x, total, b = x[:, last], total[:, last], b[:, last]  # [B A Q ...]: the chunk in which each end lies
    behind = jnp.take_along_axis(total, (rest - 1)[None, :, None, None], axis=2, mode="clip")[:, :, 0]
    upto = jnp.where(rest[:, None] > 0, behind, 0.0)  # [B A H]: the log decay from the beginning of the chunk to the end
    inside = (jnp.arange(size) < rest[:, None])[..., None]
    weights = jnp.exp(jnp.where(inside, upto[:, :, None] - total, -jnp.inf))
    read = _dot("baqx,baqe->baxe", b, _flat(x * weights[..., None]))
    return jnp.exp(upto)[:, :, None, :, None] * base + read.reshape(base.shape)


def in_chunks(z: Float[Array, "B N ..."], size: int) -> Float[Array, "B n Q ..."]:
    """Cut into chunks of `size` positions; zeros fill the last one. A log decay of zero and no input leave a state as it is."""
    missing = -z.shape[1] % size
    z = jnp.pad(z, ((0, 0), (0, missing)) + ((0, 0),) * (z.ndim - 2))
    return z.reshape(z.shape[0], -1, size, *z.shape[2:])


def _running_sum(z: Float[Array, "B n Q H"]) -> Float[Array, "B n Q H"]:
    """Sums along a chunk, as a product: a CPU computes a cumulative sum again in every loop that reads it."""
    return _dot("ij,bnjh->bnih", jnp.tril(jnp.ones((z.shape[2],) * 2)), z)


def _flat(z: Float[Array, "B n Y H C"]) -> Float[Array, "B n Y I"]:
    """Heads beside each other: where all of them take part, one wide product and no transpose."""
    return z.reshape(*z.shape[:3], -1)


def _by_head(z: Float[Array, "B n Y W C"]) -> Float[Array, "B n W Y C"]:
    """Heads before positions, or back: the order of axes in which a product of each head is walked along memory."""
    return z.swapaxes(2, 3)


def _decay_between(total: Float[Array, "B n Q H"]) -> Float[Array, "B n H Q Q"]:
    """[i, j]: what is left at position i of what position j wrote; nothing where j is later."""
    earlier = jnp.tril(jnp.ones((total.shape[2],) * 2, bool))
    total = total.swapaxes(2, 3)
    return jnp.exp(jnp.where(earlier, total[..., :, None] - total[..., None, :], -jnp.inf))


def _chunk_decay(total: Float[Array, "B n Q H"]) -> Float[Array, "n B 1 H 1"]:
    return jnp.exp(total[:, :, -1]).swapaxes(0, 1)[:, :, None, :, None]


def _chunk_states(
    x: Float[Array, "B n Q H C"], total: Float[Array, "B n Q H"], b: Float[Array, "B n Q X"], initial: Float[Array, "B X H C"]
) -> Float[Array, "B m X H C"]:
    """The state before every chunk and the one after the last, m = n + 1."""
    kept = jnp.exp(total[:, :, -1:] - total)[..., None]  # what is left at the end of the chunk of what a position wrote
    written = _dot("bnjx,bnje->nbxe", b, _flat(x * kept))
    behind = linear_scan(_chunk_decay(total), written.reshape(*written.shape[:3], *x.shape[3:]), initial)
    return jnp.concatenate([initial[None], behind]).swapaxes(0, 1)
