"""The energy head: one sample a noise vector, positions apart, and the auxiliary predictor beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.cross_entropy import plain_cross_entropy
from calm.core.dense import PRECISIONS
from calm.core.energy_head import EnergyHeadConfig, over_samples
from calm.errors import UsageError
from calm.heads.chunk_predictor import ChunkPredictor
from random_models import Layer, normal, random_model

CONFIG = EnergyHeadConfig(num_blocks=2, noise_dim=6)
SAMPLES, DIM, LATENT = 3, 8, 5
HIDDEN, NOISE = normal(2, 4, DIM), normal(SAMPLES, 2, 4, 6, seed=1)


def head(precision: str = "float32"):
    return random_model(Layer(lambda rngs: CONFIG.build(DIM, LATENT, rngs=rngs, precision=precision)))


def test_each_sample_depends_on_its_noise_and_its_position_only():
    run = jax.jit(lambda head, hidden, noise: head(hidden, noise))
    model = head()
    before = np.asarray(run(model, HIDDEN, NOISE))
    assert before.shape == (SAMPLES, 2, 4, LATENT)
    hidden, noise = HIDDEN.copy(), NOISE.copy()
    hidden[0, 1] += 1.0
    noise[2, 1, 3] += 1.0
    changed = np.abs(np.asarray(run(model, hidden, noise)) - before).max(-1) > 1e-6
    expected = np.zeros((SAMPLES, 2, 4), bool)
    expected[:, 0, 1] = expected[2, 1, 3] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_alone_is_the_sample_among_others(precision):
    model = head(precision)
    together = jax.jit(lambda hidden, noise: model(hidden, noise))(HIDDEN, NOISE)
    alone = jax.jit(lambda hidden, noise: model(hidden, noise))(HIDDEN[1, 2:3], NOISE[1:2, 1, 2:3])
    np.testing.assert_allclose(alone[0, 0], together[1, 1, 2], atol=1e-5 if precision == "float32" else 2e-2)


def test_noise_is_uniform_around_zero_and_samples_use_it():
    model = head()

    @jax.jit
    def run(key):
        return model.draw_noise(key, (500, 2, 4)), model.sample(key, jnp.asarray(HIDDEN), 500)

    noise, samples = run(jax.random.key(0))
    assert noise.shape == (500, 2, 4, 6) and samples.shape == (500, 2, 4, LATENT)
    assert -0.5 <= noise.min() < -0.49 and 0.49 < noise.max() <= 0.5
    np.testing.assert_allclose(noise.std(), 12**-0.5, rtol=0.02)
    np.testing.assert_allclose(samples, jax.jit(lambda noise: model(jnp.asarray(HIDDEN), noise))(noise), atol=1e-5)
    assert np.asarray(samples).std(0).min() > 1e-3


def test_a_new_head_gives_equal_samples_and_has_blocks_of_their_own():
    def build(key):
        return CONFIG.build(DIM, LATENT, rngs=nnx.Rngs(params=key))

    model = jax.jit(lambda key: nnx.state(build(key)))(jax.random.key(0))
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(build, jax.random.key(0))), model)
    np.testing.assert_array_equal(jax.jit(lambda hidden, noise: model(hidden, noise))(HIDDEN, NOISE), 0)
    kernels = np.asarray(model.blocks.layer.down.kernel[...])
    assert kernels.shape == (2, DIM, DIM) and len(np.unique(kernels)) == kernels.size


def test_the_gradient_over_samples_is_that_of_a_broadcast():
    x, g = normal(4, 3), normal(5, 4, 3, seed=1)
    ours, plain = (
        jax.jit(jax.grad(lambda x, f=f: (f(x) * g).sum()))(x)
        for f in (lambda x: over_samples(x, 5), lambda x: jnp.broadcast_to(x, (5, 4, 3)))
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_the_chunk_predictor_is_scored_by_plain_cross_entropy():
    predictor = random_model(Layer(lambda rngs: ChunkPredictor(DIM, 3, 7, rngs=rngs)))
    chunks, table = np.random.default_rng(0).integers(0, 11, (2, 4, 3)).astype(np.int32), normal(11, 7)

    @jax.jit
    def plain(hidden, chunks, table):
        slots = predictor.project(predictor.norm(hidden)).reshape(-1, 7)
        nats = plain_cross_entropy(slots, table, chunks.reshape(-1)).reshape(2, 4, 3).mean(-1)
        return (nats * weights).sum()

    weights = jnp.arange(8.0).reshape(2, 4) / 28
    ours = jax.jit(lambda hidden, chunks, table: predictor.loss(hidden, chunks, table, weights))(HIDDEN, chunks, table)
    np.testing.assert_allclose(ours, plain(HIDDEN, chunks, table), rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"num_blocks": 0}, {"noise_dim": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UsageError, match="num_blocks and noise_dim must be at least 1"):
        dataclasses.replace(CONFIG, **sizes)
