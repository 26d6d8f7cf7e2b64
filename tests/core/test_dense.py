"""Products: precision is a rounding of operands and nothing else, forward and backward."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.dense import PRECISIONS, Dense, matmul, operand, weight_gradient
from calm.errors import UsageError
from random_models import Layer, normal, random_model

X, KERNEL, G = (jnp.asarray(normal(*shape, seed=seed)) for seed, shape in enumerate([(37, 24), (24, 40), (37, 40)]))


def rounded(x: jax.Array, precision: str) -> np.ndarray:
    return np.asarray(operand(x, precision), np.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_value_and_gradients_are_those_of_the_rounded_operands(precision):
    @jax.jit
    def run(x, kernel, g):
        value, backward = jax.vjp(lambda x, kernel: matmul(x, kernel, precision), x, kernel)
        return value, *backward(g)

    x, kernel, g = (rounded(array, precision) for array in (X, KERNEL, G))
    for ours, expected in zip(run(X, KERNEL, G), (x @ kernel, g @ kernel.T, x.T @ g), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32_and_differs():
    exact, fast = matmul(X, KERNEL, "float32"), matmul(X, KERNEL, "bfloat16")
    error = jnp.abs(exact - fast).max() / jnp.abs(exact).max()
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_transposed_and_the_plain_weight_gradient_are_equal(precision, monkeypatch):
    x, g = operand(X, precision), operand(G, precision)
    on_cpu = jax.jit(lambda: weight_gradient(x, g))()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = jax.jit(lambda: weight_gradient(x, g))()
    np.testing.assert_allclose(on_cpu, elsewhere, rtol=1e-5, atol=1e-5)


def test_dense_maps_the_last_axis_under_any_leading_axes():
    dense = random_model(Layer(lambda rngs: Dense(24, 40, use_bias=True, rngs=rngs)))
    x, kernel, bias = normal(3, 2, 6, 24), np.asarray(dense.kernel[...]), np.asarray(dense.bias[...])
    np.testing.assert_allclose(jax.jit(lambda x: dense(x))(x), x @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_kernels_scale_with_fan_in_or_as_told():
    assert Dense(400, 300, rngs=nnx.Rngs(0)).kernel[...].std() == pytest.approx(1 / 20, rel=0.02)
    assert Dense(400, 300, init_std=0.02, rngs=nnx.Rngs(0)).kernel[...].std() == pytest.approx(0.02, rel=0.02)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="unknown precision 'float16'; choose one of float32, bfloat16"):
        inspect.unwrap(operand)(X, "float16")  # without the type checks of the test run
