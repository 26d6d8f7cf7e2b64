"""Inspection: its numbers are those of the autoencoder's own methods, and of planted codecs whose geometry is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.posterior import Gaussian
from calm.errors import UsageError
from calm.evaluate.geometry import covariance, effective_rank, participation_ratio
from calm.evaluate.inspect import inspect_autoencoder
from random_models import random_model

V, K, Z = 11, 4, 6
BLOCKS = np.random.default_rng(0).integers(0, V, (40, 20))
DOCUMENT = np.arange(40)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def autoencoder():
    return random_model(AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=Z, dim=16, inner_dim=16))


@pytest.fixture(scope="module")
def inspection(autoencoder):
    return inspect_autoencoder(autoencoder, BLOCKS, DOCUMENT, KEY, levels=(0.0, 0.5, 100.0), special_ids=(10,))


def test_statistics_are_those_of_the_posterior(autoencoder, inspection):
    posterior = autoencoder.encode(jnp.asarray(BLOCKS.reshape(-1, K), jnp.int32))
    mean, std, kl = (np.asarray(part, np.float64) for part in (posterior.mean, posterior.std, posterior.kl()))
    np.testing.assert_allclose(inspection.kl, kl.mean(0), rtol=1e-4)
    np.testing.assert_allclose(inspection.posterior_std, std.mean(0), rtol=1e-4)
    np.testing.assert_allclose(inspection.aggregate_std, np.sqrt(mean.var(0) + (std**2).mean(0)), rtol=1e-4)
    np.testing.assert_allclose(inspection.variance_of_means, mean.var(0), rtol=1e-3)
    assert inspection.effective_rank == pytest.approx(effective_rank(np.cov(mean.T, bias=True)), rel=1e-3)
    assert inspection.active == (mean.var(0) > 0.01).sum() and inspection.active + inspection.collapsed == Z


def test_accuracy_without_noise_is_the_round_trip_and_falls_to_chance(autoencoder, inspection):
    chunks = jnp.asarray(BLOCKS.reshape(-1, K), jnp.int32)
    right = np.asarray(autoencoder.decode(autoencoder.encode(chunks).mean) == chunks)
    assert [curve.unit for curve in inspection.curves] == ["latent", "posterior", "aggregate"]
    for curve in inspection.curves:
        assert curve.tokens[0].estimate == pytest.approx(right.mean(), abs=1e-6)
        assert curve.chunks[0].estimate == pytest.approx(right.all(-1).mean(), abs=1e-6)
    assert inspection.curves[0].tokens[-1].estimate == pytest.approx(1 / V, abs=0.06)


def test_each_unit_scales_the_same_noise():
    """Where every posterior and aggregate deviation is s, a level of one unit is s times a level of latent units."""

    autoencoder = random_model(AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=Z, dim=16, inner_dim=16), seed=1)
    autoencoder.encoder.to_latent.kernel[...] = autoencoder.encoder.to_latent.kernel[...].at[:, Z:].set(0.0)
    autoencoder.encoder.to_latent.bias[...] = autoencoder.encoder.to_latent.bias[...].at[Z:].set(jnp.log(0.25))
    found = inspect_autoencoder(autoencoder, BLOCKS, DOCUMENT, KEY, levels=(0.0, 0.2, 0.8))
    latent, posterior, aggregate = found.curves
    np.testing.assert_allclose(found.posterior_std, 0.25, rtol=1e-5)
    assert posterior.tokens[2].estimate == latent.tokens[1].estimate  # .8 x .25 = .2
    assert found.sampled_tokens.estimate != latent.tokens[0].estimate or posterior.tokens[1].estimate == 1
    assert aggregate.tokens[2].estimate <= latent.tokens[0].estimate + 0.05


class OneHot(nnx.Module):
    """A codec whose geometry is known: every token has its own V dimensions."""

    config = SimpleNamespace(chunk_size=K, vocab_size=V)

    def __init__(self):
        self.scale = nnx.Param(jnp.array(6.0))

    def encode(self, chunks):
        mean = self.scale[...] * jax.nn.one_hot(chunks, V).reshape(*chunks.shape[:-1], K * V)
        return Gaussian(mean, jnp.full_like(mean, jnp.log(0.3)))

    def decode(self, latents):
        return latents.reshape(*latents.shape[:-1], K, V).argmax(-1)


def test_the_way_and_the_neighbours_of_a_codec_with_a_place_for_every_token():
    found = inspect_autoencoder(OneHot(), BLOCKS, DOCUMENT, KEY, levels=(0.0,), special_ids=(10,))
    way, near = found.interpolation, found.neighbours
    np.testing.assert_allclose([*way.start[:5], *way.end[6:]], 1, rtol=1e-6)
    assert way.start[-1] == way.end[0] == 0
    np.testing.assert_allclose(way.foreign, 0, atol=1e-6)
    # one of K tokens moved, against those of K that differ between random chunks
    assert near.smoothness == pytest.approx(np.sqrt(1 / (K * (1 - 1 / V))), rel=0.1)
    assert near.posterior_draw == pytest.approx(np.sqrt(np.mean((0.3 / found.aggregate_std) ** 2)), rel=0.05)
    assert found.curves[0].chunks[0].estimate == 1 and found.active == K * V
    assert 0.85 * K * (V - 1) < found.effective_rank <= K * (V - 1)  # a place has V - 1 directions; 200 chunks blur them


def test_a_cloud_on_a_line_has_rank_one_and_a_round_one_its_dimension():
    generator = np.random.default_rng(0)
    line = np.outer(generator.normal(size=5000), [3.0, 4.0, 0.0])
    round_cloud = generator.normal(size=(20000, 3))
    for points, rank in ((line, 1.0), (round_cloud, 3.0)):
        spread = covariance(points.sum(0), points.T @ points, len(points))
        np.testing.assert_allclose(spread, np.cov(points.T, bias=True), atol=1e-6)
        assert effective_rank(spread) == pytest.approx(rank, abs=0.02)
        assert participation_ratio(spread) == pytest.approx(rank, abs=0.02)


def test_it_prints_saves_and_draws(inspection, tmp_path):
    values = inspection.to_dict()
    assert values["active_dimensions"] == inspection.active and len(values["kl"]) == Z
    assert values["curves"][1]["tokens"][0]["estimate"] == inspection.curves[1].tokens[0].estimate
    words = inspection.table()
    for part in ("posterior mean", "a draw of the posterior", "effective rank", "smoothness", "collapsed", "aggregate std"):
        assert part in words
    inspection.plot(tmp_path / "autoencoder.png")
    assert (tmp_path / "autoencoder.png").stat().st_size > 10_000


def test_levels_must_start_at_zero(autoencoder):
    with pytest.raises(UsageError, match="start at 0"):
        inspect_autoencoder(autoencoder, BLOCKS, DOCUMENT, KEY, levels=(0.1,))
