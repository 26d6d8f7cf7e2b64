"""Latent futures are what generation would write, and the gradient goes as far through them as was asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core import generate
from calm.core.decoder import ScoringTable
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.rng import row_keys
from calm.ttt.rollout import begin, draw_noise, futures, lay_out
from calm.ttt.seal import Seal, SealConfig
from ttt_models import PROMPTS, SPECIAL, WRITER, K, V, Z, concept, next_vector

KEYS = row_keys(jax.random.key(3), len(PROMPTS))


@pytest.mark.parametrize("writer", [WRITER, pytest.param(None, marks=pytest.mark.slow)])
def test_the_first_future_is_what_generation_writes_by_the_same_key(writer):
    predictor = next_vector(writer=writer)
    seal = Seal(predictor, SPECIAL)
    acted = seal.act(concept(), seal.read(PROMPTS), KEYS, num_chunks=4)
    options = dict(max_tokens=4 * K, decoding=predictor.decoding, banned=[SPECIAL.end_id])
    written = generate(predictor, PROMPTS, KEYS, special=SPECIAL, **options)
    np.testing.assert_array_equal(acted.chunks[:, 0].reshape(len(PROMPTS), -1), written.tokens)
    assert len({tuple(row) for row in written.tokens.tolist()}) > 1
    assert not np.isin(acted.chunks, [SPECIAL.begin_id, SPECIAL.end_id, SPECIAL.mask_id]).any()

    # neither the order of the prompts nor what stands in their padding matters
    chunks, starts = seal.read(PROMPTS)
    filled = np.where(np.arange(chunks.shape[1])[None, :, None] < starts[:, None, None], 5, chunks)
    back = seal.act(concept(), type(seal.read(PROMPTS))(filled[::-1], starts[::-1]), KEYS[::-1], num_chunks=4)
    np.testing.assert_array_equal(back.chunks[::-1], acted.chunks)
    np.testing.assert_allclose(back.rewards[::-1], acted.rewards, atol=1e-6)


def slope(stem, feedback, writer=None):
    """Latents, and the slope of a sum over the last latent against the noise of every step."""
    predictor = next_vector(stem, writer)
    chunks, starts = lay_out(PROMPTS[:1], K, SPECIAL.begin_id)
    begun = begin(predictor, jnp.asarray(chunks[0]), jnp.asarray(starts[0]), 2, 3)
    noise = draw_noise(predictor, jax.random.key(0), 2, 3)
    table = ScoringTable.of(predictor.table, "float32", jnp.arange(V - 3, dtype=jnp.int32))
    weights = jnp.arange(1.0, Z + 1)

    def last(latent):
        written = futures(predictor, begun, noise._replace(latent=latent), table, feedback=feedback)
        return (written.latents[0, -1] * weights).sum(), written

    with_slope = jax.jit(jax.value_and_grad(last, has_aux=True))
    (value, written), gradient = with_slope(noise.latent)
    return value, written, np.asarray(gradient), lambda latent: with_slope(latent)[0][0], noise.latent


def test_a_constant_ends_the_gradient_at_the_tokens():
    _, constant, gradient, _, _ = slope("discrete", "constant")
    assert np.abs(gradient[-1, 0]).max() > 1e-3 and not gradient[:-1].any() and not gradient[:, 1].any()
    _, through, gradient, _, _ = slope("discrete", "straight_through")
    assert np.abs(gradient[0, 0]).max() > 1e-4 and not gradient[:, 1].any()
    np.testing.assert_allclose(through.latents, constant.latents, atol=1e-5)
    np.testing.assert_array_equal(through.chunks, constant.chunks)


def test_latents_fed_back_have_the_exact_gradient_of_the_whole_trajectory():
    _, _, gradient, value, noise = slope("continuous", "latent")
    for step in range(3):
        moved = jnp.zeros_like(noise).at[step, 0, 1].set(1e-2)
        difference = (value(noise + moved) - value(noise - moved)) / 2e-2
        np.testing.assert_allclose(gradient[step, 0, 1], difference, rtol=2e-2, atol=1e-3)
    assert np.abs(gradient[0, 0]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "writer"), [("continuous", None), ("both", None), ("discrete", WRITER)])
def test_straight_through_keeps_the_values_for_every_stem(stem, writer):
    _, constant, gradient, _, _ = slope(stem, "constant", writer)
    assert not gradient[:-1].any()
    _, through, gradient, _, _ = slope(stem, "straight_through", writer)
    np.testing.assert_allclose(through.latents, constant.latents, atol=1e-5)
    assert np.abs(gradient[0, 0]).max() > 1e-5


def test_models_without_latents_in_their_text_are_refused():
    with pytest.raises(UsageError, match="reads none"):
        Seal(next_vector(writer=ContextDecoderConfig(dim=8, inner_dim=8, table_dim=8, use_latent=False)), SPECIAL)
    with pytest.raises(UsageError, match="a token model has none"):
        Seal(object(), SPECIAL)
    with pytest.raises(UsageError, match="needs a stem that reads latents alone"):
        Seal(next_vector(), SPECIAL, SealConfig(feedback="latent"))
