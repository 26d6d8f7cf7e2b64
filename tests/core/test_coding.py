"""The autoencoder: chunks alone, greedy decoding as defined, sizes as published."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.decoder import ARGMAX_GROUP, ARGMAX_ROWS, best_token
from calm.core.dense import PRECISIONS, operand
from calm.errors import UsageError
from jaxpr_flops import matmul_flops
from random_models import normal, random_model

CONFIG = AutoencoderConfig(vocab_size=70, chunk_size=3, latent_dim=5, dim=8, inner_dim=12)
CHUNKS = np.random.default_rng(0).integers(0, 70, (2, 4, 3)).astype(np.int32)
PUBLISHED = AutoencoderConfig(vocab_size=128_257, chunk_size=4, latent_dim=128, dim=512, inner_dim=1280)


def test_shapes_under_any_leading_axes_and_chunks_coded_alone():
    autoencoder = random_model(CONFIG)

    @jax.jit
    def run(chunks):
        posterior = autoencoder.encode(chunks)
        latents = posterior.mean
        return posterior, autoencoder.decode_states(latents), autoencoder.logits(latents), autoencoder.decode(latents)

    posterior, states, logits, tokens = run(CHUNKS)
    assert posterior.mean.shape == posterior.log_std.shape == (2, 4, 5)
    assert (states.shape, logits.shape, tokens.shape) == ((2, 4, 3, 8), (2, 4, 3, 70), (2, 4, 3))
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))
    np.testing.assert_allclose(logits, np.einsum("...d,vd->...v", states, autoencoder.table), atol=1e-5)
    other = CHUNKS.copy()
    other[:, 1:] = (other[:, 1:] + 1) % 70
    changed = run(other)[0]
    np.testing.assert_allclose(changed.mean[:, 0], posterior.mean[:, 0], atol=1e-6)
    assert (np.abs(changed.mean - posterior.mean)[:, 1:].max(-1) > 1e-3).all()
    flipped = run(CHUNKS[..., ::-1])[0]
    assert np.abs(flipped.mean - posterior.mean).max() > 1e-2  # the order of tokens matters


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "vocab_size"), [(3, 5), (2 * ARGMAX_ROWS + 7, 2 * ARGMAX_GROUP + 1)])
def test_ties_go_to_the_lowest_id_and_padded_columns_never_win(rows, vocab_size, precision):
    states, table = normal(rows, 8), normal(vocab_size, 8, seed=1)
    table[vocab_size // 2 :] = table[: vocab_size - vocab_size // 2]  # every token has a twin: ties go to the lowest id
    if vocab_size > ARGMAX_GROUP:
        states[0] = 0.0  # all logits tie
    else:
        table[:, 0], states[:, 0] = -10.0, 5.0  # all logits are below the 0 of padded columns

    def plain(states, table):
        states, table = operand(states, precision), operand(table, precision)
        return jnp.argmax(jnp.dot(states, table.T, preferred_element_type=jnp.float32), -1)

    ours = jax.jit(lambda states, table: best_token(states, table, precision))(states, table)
    np.testing.assert_array_equal(ours, jax.jit(plain)(states, table))
    assert ours.max() < vocab_size // 2 + 1


def test_published_size():
    assert PUBLISHED.parameters() == pytest.approx(75.8e6, rel=1e-3)


def test_flops_are_those_of_the_products_in_the_program():
    config = dataclasses.replace(CONFIG, encoder_layers=4)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    chunk, latent = jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1, 5), jnp.float32)
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).encode(x), params, chunk) == config.encoder_flops()
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).decode_states(x), params, latent) == config.decoder_flops()
    both = config.decoder_flops() + config.vocabulary_flops()
    assert matmul_flops(lambda p, x: nnx.merge(graphdef, p).logits(x), params, latent) == both


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"vocab_size": -1}, "vocab_size|must be"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"encoder_layers": 3}, "encoder_layers must be even and at least 2, got 3"),
        ({"decoder_layers": 0}, "decoder_layers must be even and at least 2, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(CONFIG, **sizes)


def test_a_vocabulary_is_needed_to_build():
    with pytest.raises(UsageError, match="vocab_size must be set"):
        AutoencoderConfig().build(rngs=nnx.Rngs(0))
