"""Reconstruction sums and the moments of latents."""

import jax
import jax.numpy as jnp
import numpy as np

from calm.evaluate.reconstruction import latent_moments, reconstruction, with_noise


def test_one_wrong_token_costs_one_token_and_one_chunk():
    tokens = jnp.arange(24).reshape(2, 3, 4)
    predicted = tokens.at[0, 1, 2].add(1)
    sums = reconstruction(predicted, tokens)
    np.testing.assert_allclose(sums.tokens.value, [11 / 12, 1])
    np.testing.assert_allclose(sums.chunks.value, [2 / 3, 1])
    kept = reconstruction(predicted, tokens, jnp.array([0.0, 1.0]))
    assert kept.tokens.total.sum() / kept.tokens.count.sum() == 1


def test_parts_add_up_to_the_whole():
    tokens = jax.random.randint(jax.random.key(0), (6, 5, 4), 0, 3)
    predicted = jax.random.randint(jax.random.key(1), (6, 5, 4), 0, 3)
    merged = jax.tree.map(np.sum, reconstruction(predicted[:2], tokens[:2])) + jax.tree.map(
        np.sum, reconstruction(predicted[2:], tokens[2:])
    )
    np.testing.assert_allclose(merged.tokens.value, (predicted == tokens).mean(), rtol=1e-6)
    np.testing.assert_allclose(merged.chunks.value, (predicted == tokens).all(-1).mean(), rtol=1e-6)


def test_moments_are_those_of_the_aggregate_posterior():
    mean = jnp.concatenate([3 + 2 * jax.random.normal(jax.random.key(0), (4000, 1)), jnp.zeros((4000, 1))], -1)
    std = jnp.broadcast_to(jnp.array([0.3, 1.0]), mean.shape)
    weights = jnp.ones(4000)
    parts = [latent_moments(mean[s], std[s], std[s], weights[s]) for s in (slice(0, 1500), slice(1500, 4000))]
    whole = parts[0] + parts[1]
    draws = mean + std * jax.random.normal(jax.random.key(1), mean.shape)
    np.testing.assert_allclose(whole.aggregate_std, draws.std(0), rtol=0.04)
    np.testing.assert_allclose(whole.posterior_std, [0.3, 1.0], rtol=1e-4)
    assert whole.active_dimensions == 1


def test_noise_is_in_the_unit_that_was_asked_for():
    latents, scale = jnp.zeros((20_000, 2)), jnp.array([1.0, 5.0])
    absolute, relative = (with_noise(latents, jax.random.key(0), 0.3, unit) for unit in (None, scale))
    np.testing.assert_allclose(absolute.std(0), [0.3, 0.3], rtol=0.03)
    np.testing.assert_allclose(relative.std(0), [0.3, 1.5], rtol=0.03)
