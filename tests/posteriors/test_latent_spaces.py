"""Options of the autoencoder's latent, a sphere and two levels: what is built, what it costs, refuses and learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from calm import config as configuration
from calm.config import from_dict
from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.clipped_kl import clipped_kl
from calm.core.gaussian import Gaussian
from calm.core.objective import AutoencoderLossConfig, AutoencoderObjective
from calm.errors import UsageError
from calm.posteriors.hierarchical import HierarchicalAutoencoder
from calm.posteriors.power_spherical import PowerSpherical
from calm.rng import stream
from calm.runs.folders import export_autoencoder, load_exported_autoencoder
from calm.runs.weights import flat_weights
from jaxpr_flops import matmul_flops
from random_models import normal, random_model

FLAT = AutoencoderConfig(vocab_size=24, chunk_size=6, latent_dim=5, dim=8, inner_dim=12)
SPHERE = dataclasses.replace(FLAT, posterior="power_spherical")
HIERARCHICAL = {"kind": "hierarchical"}
LEVELS = from_dict(AutoencoderConfig, dict(HIERARCHICAL, lower_chunk_size=2, lower_latent_dim=4), FLAT)
BOTH = dataclasses.replace(LEVELS, posterior="power_spherical")
OPTIONS = {"sphere": SPHERE, "levels": LEVELS, "both": BOTH}
CHUNKS = np.random.default_rng(0).integers(3, 24, (3, 4, 6)).astype(np.int32)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_either_option_is_an_autoencoder(config):
    autoencoder = random_model(config)

    @jax.jit
    def run(chunks):
        posterior = autoencoder.encode(chunks)
        return posterior, autoencoder.logits(posterior.mean), autoencoder.decode(posterior.mean)

    posterior, logits, tokens = run(CHUNKS)
    assert isinstance(posterior, PowerSpherical if config.posterior == "power_spherical" else Gaussian)
    assert posterior.mean.shape == (3, 4, 5) and logits.shape == (3, 4, 6, 24)
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))
    assert isinstance(autoencoder, HierarchicalAutoencoder) == (config.kind == "hierarchical")


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_flops_are_those_of_the_products_in_the_program(config):
    config = dataclasses.replace(config, encoder_layers=4)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    chunk, latent = jax.ShapeDtypeStruct((1, 6), jnp.int32), jax.ShapeDtypeStruct((1, 5), jnp.float32)
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).encode(x), params, chunk) == config.encoder_flops()
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).decode_states(x), params, latent) == config.decoder_flops()
    both = config.decoder_flops() + config.vocabulary_flops()
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).logits(x), params, latent) == both
    assert config.parameters() == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_an_export_is_the_model_and_says_what_it_is(config, tmp_path):
    autoencoder = random_model(config)
    export_autoencoder(autoencoder, tmp_path)
    loaded = load_exported_autoencoder(tmp_path)
    ours, theirs = flat_weights(autoencoder), flat_weights(loaded)
    assert loaded.config == config and type(loaded) is type(autoencoder) and ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


# -- the sphere -------------------------------------------------------------------------------------------------------


def test_the_decoder_of_a_sphere_hears_directions_alone():
    latents = jnp.asarray(normal(7, 5))
    sphere, flat = random_model(SPHERE), random_model(FLAT)
    far = jax.jit(lambda latents: sphere.decode_states(3.7 * latents))(latents)
    np.testing.assert_allclose(far, jax.jit(sphere.decode_states)(latents), atol=1e-5)
    assert np.abs(jax.jit(flat.decode_states)(3.7 * latents) - flat.decode_states(latents)).max() > 0.1
    assert np.isfinite(jax.grad(lambda latents: sphere.decode_states(latents).sum())(jnp.zeros((1, 5)))).all()


# -- two levels -------------------------------------------------------------------------------------------------------


def test_parts_are_coded_alone_and_with_the_same_weights():
    autoencoder = random_model(LEVELS)
    encode = jax.jit(autoencoder.encode_lower)
    parts = encode(CHUNKS)
    assert parts.mean.shape == (3, 4, 3, 4)
    other = CHUNKS.copy()
    other[..., 2:4] = (other[..., 2:4] + 1) % 24
    moved = np.abs(encode(other).mean - parts.mean).max(-1)
    assert (moved[..., 1] > 1e-3).all() and moved[..., [0, 2]].max() < 1e-6
    turned = encode(CHUNKS.reshape(3, 4, 3, 2)[:, :, [2, 0, 1]].reshape(CHUNKS.shape))
    np.testing.assert_allclose(turned.mean, parts.mean[:, :, [2, 0, 1]], atol=1e-5)
    alone = jax.jit(autoencoder.lower.encode)(CHUNKS.reshape(3, 4, 3, 2))
    for ours, theirs in zip(parts, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_lower_level_is_an_autoencoder_of_its_own(tmp_path):
    """It can be taken out, written and read, and the chunk's latent decodes through it and the table that it holds."""
    autoencoder = random_model(LEVELS)
    assert type(autoencoder.lower) is Autoencoder and autoencoder.lower.config == LEVELS.lower
    export_autoencoder(autoencoder.lower, tmp_path)
    lower = load_exported_autoencoder(tmp_path)
    latents = jnp.asarray(normal(7, 5))
    parts = autoencoder.decode_lower(latents)
    assert parts.shape == (7, 3, 4)
    states = lower.decode_states(parts).reshape(7, 6, 8)
    np.testing.assert_allclose(autoencoder.decode_states(latents), states, atol=1e-5)
    np.testing.assert_array_equal(autoencoder.table, lower.table)


def test_the_loss_of_two_levels_is_the_upper_one_s_and_the_lower_one_s():
    plain = dict(token_dropout=0.0, latent_dropout=0.0, random_chunks=0.0, kl_weight=0.01, kl_clamp=0.3)
    key, tokens = jax.random.key(5), jnp.asarray(CHUNKS.reshape(3, 24))
    both = AutoencoderObjective(dataclasses.replace(LEVELS, lower_weight=0.5), AutoencoderLossConfig(**plain), mask_id=2)
    params = both.init(jax.random.key(0))
    value, terms = jax.jit(both.loss)(params, {}, tokens, key)
    autoencoder, chunks = both.module(params), jnp.asarray(CHUNKS.reshape(12, 6))

    def of_level(coder, posterior, tokens, key):
        probability = jax.nn.log_softmax(coder.logits(posterior.sample(stream(key, "posterior"))))
        nats = -jnp.take_along_axis(probability, jnp.asarray(tokens)[..., None], -1)
        return nats.mean() * tokens.shape[-1] + 0.01 * clipped_kl(posterior.kl(), 0.3).mean()

    upper = of_level(autoencoder, autoencoder.encode(chunks), chunks, key)
    parts = chunks.reshape(12, 3, 2)
    lower = of_level(autoencoder.lower, autoencoder.lower.encode(parts), parts, stream(key, "lower"))
    np.testing.assert_allclose(value, upper + 0.5 * 3 * lower, rtol=1e-5)
    assert {"lower_cross_entropy", "lower_kl", "lower_posterior_std"} < set(terms)
    alone = AutoencoderObjective(dataclasses.replace(LEVELS, lower_weight=0.0), AutoencoderLossConfig(**plain), mask_id=2)
    value, terms = jax.jit(alone.loss)(params, {}, tokens, key)
    np.testing.assert_allclose(value, upper, rtol=1e-5)
    assert not any(name.startswith("lower") for name in terms)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_flops_of_training_are_three_times_the_products_of_the_loss(weight, monkeypatch):
    objective = AutoencoderObjective(dataclasses.replace(LEVELS, lower_weight=weight), AutoencoderLossConfig(), mask_id=2)
    monkeypatch.setattr("calm.core.objective.fused_cross_entropy", lambda states, *others: states.sum())
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 6), jnp.int32)
    products = matmul_flops(lambda p, t: objective.loss(p, {}, t, jax.random.key(0))[0], shapes, tokens)
    logits = LEVELS.vocabulary_flops() * (2 if weight else 1)
    assert objective.flops_per_token() == 3 * (products + logits) / 6


@pytest.mark.parametrize("config", [SPHERE, LEVELS], ids=["sphere", "levels"])
def test_a_few_steps_lower_the_loss_of_every_level(config):
    lower = {"lower_latent_dim": 8} if config.kind == "hierarchical" else {}
    config = dataclasses.replace(config, latent_dim=16, dim=16, **lower)
    objective = AutoencoderObjective(config, AutoencoderLossConfig(random_chunks=0.0), mask_id=2)
    tokens, optimizer = jnp.asarray(CHUNKS.reshape(3, 24)), optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            (_, terms), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, {}, tokens, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), terms

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 60))[1]

    terms = train(objective.init(jax.random.key(0)))
    for name in ("cross_entropy", "lower_cross_entropy") if config.kind == "hierarchical" else ("cross_entropy",):
        assert np.isfinite(terms[name]).all() and terms[name][-10:].mean() < 0.75 * terms[name][0], (name, terms[name])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"posterior": "power_spherical", "latent_dim": 1}, "power_spherical posterior needs latent_dim of at least 2, got 1"),
        ({"latent_dim": 0}, "needs latent_dim of at least 1, got 0"),
        ({**HIERARCHICAL, "lower_chunk_size": 4}, "lower_chunk_size must divide chunk_size=6 and be less, got 4"),
        ({**HIERARCHICAL, "lower_chunk_size": 6}, "must divide chunk_size=6 and be less, got 6"),
        ({**HIERARCHICAL, "lower_chunk_size": -2}, "must divide chunk_size=6 and be less, got -2"),
        ({**HIERARCHICAL, "lower_chunk_size": 3, "lower_latent_dim": 0}, "needs lower_latent_dim of at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(sizes, words):
    with pytest.raises(UsageError, match=words) as raised:
        from_dict(AutoencoderConfig, sizes, FLAT)
    assert "\n" not in str(raised.value)


def test_an_unknown_posterior_is_refused_in_one_line():
    with pytest.raises(
        UsageError, match="file.toml: autoencoder: unknown posterior 'gausian'; choose one of gaussian, power_spherical"
    ):
        configuration.from_dict(AutoencoderConfig, {"posterior": "gausian"}, where="file.toml")


def test_negative_weights_of_the_lower_level_are_refused():
    with pytest.raises(UsageError, match="lower_weight must not be negative"):
        dataclasses.replace(LEVELS, lower_weight=-1.0)
