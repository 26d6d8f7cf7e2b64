"""Linear recurrences: the fast forms are the loop, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.errors import UsageError
from calm.hybrid.scans import METHODS, linear_scan, plain_selective_scan, selective_scan, states_after
from random_models import normal

B, N, H, C, X, CHUNK = 2, 21, 3, 4, 5, 8


def log_decays(*shape: int, strongest: float) -> np.ndarray:
    return -strongest * np.random.default_rng(7).random(shape, np.float32)


def arguments(length: int = N, strongest: float = 1.0) -> tuple[np.ndarray, ...]:
    """x, log_decay, b, c, initial."""
    heads = (B, length, H)
    return (
        normal(*heads, C),
        log_decays(*heads, strongest=strongest),
        normal(B, length, X, seed=1),
        normal(B, length, X, seed=2),
        normal(B, X, H, C, seed=3),
    )


def looped(decay, inputs, initial):
    states, state = [], initial
    for a, b in zip(decay, inputs, strict=True):
        state = a * state + b
        states.append(state)
    return np.stack(states)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_scan_is_the_loop(method):
    decay, inputs, initial = np.exp(log_decays(9, 2, 1, strongest=2.0)), normal(9, 2, 4), normal(2, 4, seed=1)
    scan = jax.jit(lambda *z: linear_scan(*z, method=method))
    np.testing.assert_allclose(scan(decay, inputs, initial), looped(decay, inputs, initial), atol=1e-5)
    np.testing.assert_allclose(scan(decay, inputs), looped(decay, inputs, np.zeros_like(initial)), atol=1e-5)


def test_both_methods_have_the_same_gradients():
    decay, inputs, initial = np.exp(log_decays(9, 2, 1, strongest=2.0)), normal(9, 2, 4), normal(2, 4, seed=1)
    first, second = (
        jax.jit(jax.grad(lambda *z, method=method: jnp.sin(linear_scan(*z, method=method)).sum(), (0, 1, 2)))(
            decay, inputs, initial
        )
        for method in METHODS
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_method_must_be_known():
    with pytest.raises(UsageError, match="unknown scan method 'fast'; choose one of sequential, associative"):
        linear_scan(jnp.ones((2, 1)), jnp.ones((2, 1)), method="fast")


def loss(scan):
    def both(*z):
        y, last = scan(*z)
        return jnp.sin(y).sum() + jnp.cos(2 * last).sum()

    return jax.jit(jax.grad(both, (0, 1, 2, 3, 4)))


@pytest.mark.parametrize("strongest", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("length", [1, 8, N])
def test_chunks_of_products_are_the_scan_over_positions(length, strongest):
    """Shorter than a chunk, one chunk, and several with the last one open; hardly forgetting and forgetting at once."""
    z = arguments(length, strongest)
    fast = jax.jit(lambda *z: selective_scan(*z, chunk=CHUNK))
    for ours, theirs in zip(fast(*z), jax.jit(plain_selective_scan)(*z), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    slopes = loss(lambda *z: selective_scan(*z, chunk=CHUNK))(*z), loss(plain_selective_scan)(*z)
    for ours, theirs in zip(*slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()))


def test_without_a_first_state_it_is_zero():
    *z, initial = arguments()
    scan = jax.jit(lambda *z: selective_scan(*z, chunk=CHUNK))
    (y, last), (again, same) = scan(*z), scan(*z, np.zeros_like(initial))
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(last, same)


def test_states_after_are_those_of_every_prefix():
    """At both ends, within a chunk and between chunks; what follows an end does not reach its state."""
    x, log_decay, b, *_ = arguments()
    ends = [0, 1, 7, 8, 9, 16, 20, 21]
    found = jax.jit(lambda *z: states_after(*z, chunk=CHUNK))(x, log_decay, b, jnp.array(ends))
    states = looped(
        np.exp(log_decay).swapaxes(0, 1)[:, :, None, :, None], np.einsum("bnx,bnhc->nbxhc", b, x), np.zeros((B, X, H, C))
    )
    for a, end in enumerate(ends):
        np.testing.assert_allclose(found[:, a], states[end - 1] if end else np.zeros((B, X, H, C)), atol=1e-5)
    later = [z.copy() for z in (x, log_decay, b)]
    for z in later:
        z[:, 9:] += 1.0
    again = jax.jit(lambda *z: states_after(*z, chunk=CHUNK))(*later, jnp.array(ends))
    np.testing.assert_array_equal(found[:, :5], again[:, :5])
    assert (np.abs(found - again)[:, 5:].max((0, 2, 3, 4)) > 1e-3).all()


def test_nothing_overflows_where_everything_is_forgotten():
    """A log decay of -1e4 a position: the sums of a chunk are large, the exponents below zero, the gradients zero."""
    x, _, b, c, initial = arguments()
    z = (x, np.full((B, N, H), -1e4, np.float32), b, c, initial)
    y, last = jax.jit(lambda *z: selective_scan(*z, chunk=CHUNK))(*z)
    np.testing.assert_allclose(y, np.einsum("bnx,bnx,bnhc->bnhc", c, b, x), atol=1e-5)
    slopes = loss(lambda *z: selective_scan(*z, chunk=CHUNK))(*z)
    assert all(np.isfinite(slope).all() for slope in slopes) and np.abs(slopes[4]).max() == 0
    assert np.isfinite(last).all()
