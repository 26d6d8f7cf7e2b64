"""Stage 2 and the closer looks on a sphere and on two levels: whoever uses a posterior uses its own law."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentLossConfig, LatentObjective
from calm.core.posterior import PowerSpherical
from calm.core.predictor import NextVector
from calm.evaluate.blocks import evaluate_autoencoder
from calm.evaluate.inspect import inspect_autoencoder
from calm.evaluate.likelihood import evaluate_likelihood
from calm.evaluate.ngram import Unigram
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.mixture import MixtureHeadConfig
from calm.rng import stream
from random_models import random_model

SIZES = dict(vocab_size=24, chunk_size=4, latent_dim=6)
FLAT = AutoencoderConfig(**SIZES, dim=8, inner_dim=12)
SPHERE = dataclasses.replace(FLAT, posterior="power_spherical")
LEVELS = dataclasses.replace(FLAT, lower_chunk_size=2, lower_latent_dim=4)
BACKBONE = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=24)
ENERGY = EnergyHeadConfig(num_blocks=1, noise_dim=4)
TOKENS = np.random.default_rng(0).integers(3, 24, (4, 32)).astype(np.int32)
KEY = jax.random.key(0)


@functools.cache
def coder(config: AutoencoderConfig):
    return random_model(config)


def objective(config: AutoencoderConfig, head=ENERGY, stem="discrete", **terms) -> LatentObjective:
    model = LatentLMConfig(**SIZES, backbone=BACKBONE, head=head, stem=stem)
    return LatentObjective(model, LatentLossConfig(num_samples=3, **terms), coder(config), context=8)


@pytest.mark.parametrize(("config", "stem"), [(SPHERE, "both"), (LEVELS, "discrete")], ids=["sphere", "levels"])
def test_a_language_model_learns_from_its_latents(config, stem):
    """The energy score alone, over text that repeats itself: fidelity falls, and so does the score."""
    ours, tokens = objective(config, stem=stem), jnp.asarray(np.tile(TOKENS[:, :8], (1, 4)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            (_, terms), gradient = jax.value_and_grad(ours.loss, has_aux=True)(params, ours.frozen, tokens, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), terms["energy"]

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 40))[1]

    energy = train(ours.init(jax.random.key(1)))
    assert np.isfinite(energy).all() and energy[-5:].mean() < 0.9 * energy[0]


@pytest.mark.parametrize(
    "head",
    [
        FlowHeadConfig(num_blocks=1, num_steps=2, num_draws=3),
        DiffusionHeadConfig(num_blocks=1, num_steps=2, num_draws=3),
        MixtureHeadConfig(num_components=2, num_blocks=1),
    ],
    ids=lambda head: type(head).__name__,
)
def test_a_head_s_own_loss_aims_at_draws_of_the_law(head, monkeypatch):
    """All draws put in one place, the loss is of that place: no head makes Gaussian draws of its own."""
    built = random_model(LatentLMConfig(**SIZES, backbone=BACKBONE, head=head)).head
    posterior = coder(SPHERE).encode(jnp.asarray(TOKENS[:, :4]))
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16)), jnp.float32)
    seen, places = [], (jnp.zeros(6), jnp.full(6, 5.0))

    def draws(self, key, count):
        seen.append(count)
        return jnp.broadcast_to(places[len(seen) - 1], (count, *self.mean.shape))

    monkeypatch.setattr(PowerSpherical, "draws", draws)
    values = [jax.jit(lambda: built.loss(KEY, hidden, posterior))() for _ in places]
    assert all(value.shape == (4,) and np.isfinite(value).all() for value in values)
    assert seen == [head.num_draws] * 2 and (np.abs(values[0] - values[1]) > 1e-2).all()


BLOCKS, DOCUMENT = TOKENS.reshape(8, 16), np.arange(8)


@jax.jit
def encoded():
    """The posterior's statistics on the blocks, and what a draw of each block's own key decodes to."""
    autoencoder = coder(SPHERE)
    posterior = autoencoder.encode(jnp.asarray(BLOCKS.reshape(8, 4, 4)))
    keys = jax.vmap(lambda row: jax.random.fold_in(stream(KEY, "noise"), row))(jnp.arange(8))
    drawn = autoencoder.decode(jax.vmap(PowerSpherical.sample)(posterior, keys))
    return posterior.mean, posterior.std, posterior.kl(), drawn


def test_evaluation_scores_draws_of_the_sphere():
    report = evaluate_autoencoder(coder(SPHERE), BLOCKS, DOCUMENT, KEY, noise=())
    _, std, kl, drawn = map(np.asarray, encoded())
    assert report.sampled.tokens.estimate == pytest.approx((drawn == BLOCKS.reshape(8, 4, 4)).mean())
    assert report.posterior_std == pytest.approx(float(std.mean()), rel=1e-4)
    assert report.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)


def test_the_spread_of_all_latents_and_their_centre_make_up_the_radius():
    """Every draw has a square of Z, so the aggregate's variances and the square of its mean add up to it."""
    found = inspect_autoencoder(coder(SPHERE), BLOCKS, DOCUMENT, KEY, levels=(0.0,))
    mean, _, kl, _ = map(np.asarray, encoded())
    centre = mean.reshape(-1, 6).mean(0)
    assert np.square(found.aggregate_std).sum() + np.square(centre).sum() == pytest.approx(6.0, rel=1e-3)
    assert len(found.kl) == 6 and found.kl.sum() == pytest.approx(kl.sum(-1).mean(), rel=1e-4)


@pytest.mark.parametrize("config", [FLAT, SPHERE], ids=["gaussian", "sphere"])
def test_a_bound_from_the_encoder_needs_densities_over_one_space(config):
    head = MixtureHeadConfig(num_components=2, num_blocks=1)
    lm = random_model(LatentLMConfig(**SIZES, backbone=BACKBONE, head=head))
    unigram = Unigram(np.full(24, 1 / 24))
    report = evaluate_likelihood(
        NextVector(coder(config), lm),
        TOKENS[:2, :16],
        np.arange(2),
        KEY,
        unigram=unigram,
        calibration=TOKENS[2:, :16],
        fitted_on="others",
        num_bytes=50,
        num_samples=2,
    )
    assert (report.encoder is None) == (config is SPHERE) and np.isfinite(report.nats_per_token.estimate)
