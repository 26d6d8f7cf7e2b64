"""A stack of layers is its layers, one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.mlp import ResidualSwiGLU
from calm.core.stack import Stack
from random_models import Layer, normal, random_model

LENGTH = 3


def build(rngs: nnx.Rngs) -> Stack:
    return Stack(lambda rngs: ResidualSwiGLU(4, 6, precision="float32", rngs=rngs), LENGTH, rngs=rngs)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_is_the_python_loop_in_value_and_gradient(remat):
    stack = random_model(Layer(build))
    graphdef, params = nnx.split(stack)
    x, shifts = normal(5, 4), np.arange(LENGTH, dtype=np.float32)

    def step(layer, x, shift):
        y = layer(x) + shift
        return y, y.sum()

    def scanned(params, x):
        x, sums = nnx.merge(graphdef, params).scan(step, x, shifts, remat=remat)
        return jnp.square(x).sum(), sums

    def looped(params, x):
        layer_graphdef, stacked = nnx.split(nnx.merge(graphdef, params).layer)
        sums = []
        for index in range(LENGTH):
            layer = nnx.merge(layer_graphdef, jax.tree.map(lambda array, index=index: array[index], stacked))
            x, total = step(layer, x, shifts[index])
            sums.append(total)
        return jnp.square(x).sum(), jnp.stack(sums)

    results = [jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(params, x) for run in (scanned, looped)]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
