"""The autoencoder by parts: codes of one length, the nearest code back, each token alone, training, export, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.config import from_dict
from calm.core.autoencoder import AutoencoderConfig
from calm.core.chunk_decoder import FrozenDecoder, token_log_probs
from calm.core.gaussian import Gaussian
from calm.core.objective import AutoencoderLossConfig, AutoencoderObjective
from calm.errors import UsageError
from calm.posteriors.parts import PartsAutoencoder, PartsAutoencoderConfig
from calm.runs.folders import export_autoencoder, load_exported_autoencoder
from calm.runs.weights import flat_weights
from jaxpr_flops import matmul_flops
from random_models import normal, random_model

CONFIG = PartsAutoencoderConfig(vocab_size=200, chunk_size=3, latent_dim=24)
WIDTH = 8
CHUNKS = jnp.asarray(np.random.default_rng(0).integers(0, 200, (5, 7, 3)), jnp.int32)


@pytest.fixture(scope="module")
def model() -> PartsAutoencoder:
    return random_model(CONFIG)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_token_comes_back(precision):
    model = random_model(CONFIG, precision=precision)
    chunks = np.arange(198).reshape(-1, 3)
    np.testing.assert_array_equal(jax.jit(lambda chunks: model.decode(model.encode(chunks).mean))(chunks), chunks)


def test_codes_have_one_length_and_each_token_has_its_own_part(model):
    np.testing.assert_allclose(jnp.square(model.table).sum(-1), WIDTH, rtol=1e-4)
    posterior = model.encode(CHUNKS)
    assert isinstance(posterior, Gaussian) and posterior.mean.shape == (5, 7, 24)
    parts = np.asarray(posterior.mean).reshape(5, 7, 3, WIDTH)
    np.testing.assert_array_equal(parts, model.table[CHUNKS])
    other = CHUNKS.at[..., 1].set((CHUNKS[..., 1] + 1) % 200)
    changed = np.abs(np.asarray(model.encode(other).mean).reshape(parts.shape) - parts).max(-1) > 0
    np.testing.assert_array_equal(changed, np.broadcast_to([False, True, False], changed.shape))


def test_any_vector_decodes_to_the_nearest_codes(model):
    latents = normal(40, 24, seed=1)
    far = ((latents.reshape(40, 3, 1, WIDTH) - np.asarray(model.table)) ** 2).sum(-1)
    np.testing.assert_array_equal(model.decode(jnp.asarray(latents)), far.argmin(-1))
    assert model.decode_states(jnp.asarray(latents)).shape == (40, 3, WIDTH)


def test_log_probabilities_are_those_of_a_softmax_over_distances_to_the_codes(model):
    latents, targets = normal(2, 5, 24, seed=1), CHUNKS[:, 0]
    sharpness = float(jnp.exp(model.log_sharpness[...])[0])
    logits = -0.5 * sharpness * ((latents.reshape(2, 5, 3, 1, WIDTH) - np.asarray(model.table)) ** 2).sum(-1)
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.broadcast_to(targets, (2, 5, 3))[..., None], -1)
    hidden, previous = jnp.zeros((5, 1)), jnp.zeros((5, 0), jnp.int32)
    found = token_log_probs(FrozenDecoder(model), hidden, previous, jnp.asarray(latents), targets, "float32")
    np.testing.assert_allclose(found, expected[..., 0], atol=1e-3)


def test_flops_are_those_of_the_products_in_the_program(model):
    assert matmul_flops(lambda chunks: model.encode(chunks).mean, CHUNKS[0, :1]) == CONFIG.encoder_flops() == 0
    products = matmul_flops(lambda latents: model.logits(latents), jnp.zeros((1, 24)))
    assert products == CONFIG.decoder_flops() + CONFIG.vocabulary_flops()
    assert CONFIG.parameters() == 200 * WIDTH + 2


def test_training_moves_codes_apart_and_learns_width_and_sharpness():
    config = dataclasses.replace(CONFIG, std=0.5)
    objective = AutoencoderObjective(config, AutoencoderLossConfig(token_dropout=0.0), mask_id=2)
    tokens, optimizer = jnp.asarray(CHUNKS.reshape(5, 21)), optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            (_, terms), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, {}, tokens, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), terms

        (params, _), terms = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 200))
        return params, terms

    before = objective.init(jax.random.key(0))
    after, terms = train(before)
    assert terms["cross_entropy"][-20:].mean() < 0.7 * terms["cross_entropy"][0]

    def nearest(params):
        codes = np.asarray(objective.module(params).table)
        return np.sort(codes @ codes.T, axis=-1)[:, -2].mean()  # product with the nearest other code

    assert nearest(after) < nearest(before) - 0.2
    module = objective.module(after)
    assert abs(float(module.log_std[0]) - np.log(0.5)) > 0.01 and float(module.log_sharpness[0]) > 0.05


def test_an_export_is_the_model(model, tmp_path):
    export_autoencoder(model, tmp_path)
    loaded = load_exported_autoencoder(tmp_path)
    ours, theirs = flat_weights(model), flat_weights(loaded)
    assert loaded.config == CONFIG and type(loaded) is PartsAutoencoder and ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_settings_of_layers_that_it_does_not_have_are_reset():
    base = AutoencoderConfig(vocab_size=200, chunk_size=3, latent_dim=24, dim=64, inner_dim=99, encoder_layers=4, init_std=0.02)
    assert from_dict(AutoencoderConfig, {"kind": "parts"}, base) == CONFIG
    assert dataclasses.replace(CONFIG, latent_dim=48).dim == 16


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(latent_dim=25), "latent_dim = chunk_size times at least 2, got latent_dim=25 and chunk_size=3"),
        (dict(latent_dim=3), "latent_dim = chunk_size times at least 2, got latent_dim=3"),
        (dict(posterior="power_spherical"), "kind parts has a gaussian posterior, got posterior='power_spherical'"),
        (dict(std=0.0), "std and embedding_std of kind parts must be above 0"),
        (dict(chunk_size=0), "chunk_size, dim and inner_dim must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes, words):
    with pytest.raises(UsageError, match=words) as raised:
        dataclasses.replace(CONFIG, **sizes)
    assert "\n" not in str(raised.value)
