"""The Gaussian of a chunk: densities, divergence and draws agree with one another."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from calm.core.posterior import Gaussian

POSTERIOR = Gaussian(jnp.asarray([0.0, 1.5, -2.0]), jnp.asarray(np.log([1.0, 0.3, 2.0])))


def test_log_prob_is_the_log_density():
    latents = np.random.default_rng(0).normal(size=(5, 3))
    expected = scipy.stats.norm.logpdf(latents, POSTERIOR.mean, POSTERIOR.std)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(POSTERIOR.log_prob))(jnp.asarray(latents, jnp.float32)), expected, rtol=1e-5, atol=1e-6
    )


def test_kl_is_the_expected_log_ratio_to_the_standard_normal():
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    latents = jnp.asarray(np.asarray(POSTERIOR.mean) + np.outer(points, POSTERIOR.std), jnp.float32)
    ratio = jax.jit(jax.vmap(POSTERIOR.log_prob))(latents) - scipy.stats.norm.logpdf(latents)
    np.testing.assert_allclose(POSTERIOR.kl(), weights @ np.asarray(ratio) / weights.sum(), rtol=1e-4, atol=1e-5)
    assert POSTERIOR.kl()[0] == 0


def test_samples_have_the_mean_and_std_and_carry_gradients_to_both():
    draws = 20_000
    samples = jax.jit(jax.vmap(POSTERIOR.sample))(jax.random.split(jax.random.key(0), draws))
    np.testing.assert_allclose((samples.mean(0) - POSTERIOR.mean) / POSTERIOR.std, 0, atol=4 * draws**-0.5)
    np.testing.assert_allclose(samples.std(0) / POSTERIOR.std, 1, atol=4 * (2 * draws) ** -0.5)
    gradient = jax.jit(jax.grad(lambda posterior: posterior.sample(jax.random.key(1)).sum()))(POSTERIOR)
    np.testing.assert_array_equal(gradient.mean, 1)
    np.testing.assert_allclose(gradient.log_std, POSTERIOR.sample(jax.random.key(1)) - POSTERIOR.mean, rtol=1e-5)
