"""The clamp is per dimension and stops the gradient below it."""

import jax
import jax.numpy as jnp
import numpy as np

from calm.core import clipped_kl


def test_each_dimension_counts_at_least_the_clamp_and_has_no_gradient_below_it():
    kl = jnp.array([[0.1, 0.9, 0.4], [2.0, 0.0, 0.6]])
    np.testing.assert_allclose(clipped_kl(kl), [0.5 + 0.9 + 0.5, 2.0 + 0.5 + 0.6])
    np.testing.assert_array_equal(jax.grad(lambda kl: clipped_kl(kl).sum())(kl), [[0, 1, 0], [1, 0, 1]])
    np.testing.assert_allclose(clipped_kl(kl, 0.0), kl.sum(-1))
