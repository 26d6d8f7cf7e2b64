"""The loss of a batch with prompts is that of the responses, read behind the prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentLossConfig, LatentObjective
from calm.core.response_mask import split_mask, target_weights
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenObjective
from random_models import random_model

BACKBONE = BackboneConfig(dim=8, num_layers=1, num_heads=1, num_kv_heads=1, inner_dim=8)
CODEC = AutoencoderConfig(vocab_size=24, chunk_size=2, latent_dim=6, dim=8, inner_dim=12)
LATENT = LatentLMConfig(
    vocab_size=24, chunk_size=2, latent_dim=6, backbone=BACKBONE, head=EnergyHeadConfig(num_blocks=1, noise_dim=4)
)
TOKENS = np.random.default_rng(0).integers(3, 24, (2, 12)).astype(np.int32)
PROMPTED = TOKENS.copy()
PROMPTED[0, :6], PROMPTED[1, :4] = ~TOKENS[0, :6], ~TOKENS[1, :4]


def objectives():
    terms = dict(auxiliary_weight=0.5, anchor_weight=0.1, likelihood_weight=0.3, likelihood_samples=2, slot_energy_weight=0.2)
    return {
        "token": TokenObjective(TokenLMConfig(vocab_size=24, backbone=BACKBONE), context=12),
        "latent": LatentObjective(LATENT, LatentLossConfig(num_samples=3, **terms), random_model(CODEC), context=6),
    }


def test_ids_and_what_counts_are_told_apart():
    ids, counted = split_mask(jnp.asarray(PROMPTED))
    np.testing.assert_array_equal(ids, TOKENS)
    np.testing.assert_array_equal(counted, PROMPTED >= 0)
    weights = target_weights(counted, 2)
    np.testing.assert_allclose(weights, np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]) / 7, rtol=1e-6)
    assert target_weights(jnp.zeros((2, 12), bool), 2).sum() == 0
    # a chunk that a response begins in the middle of belongs to the prompt; one that it ends in, to the response
    np.testing.assert_array_equal(target_weights(jnp.asarray([[0, 0, 0, 1, 1, 0]], bool), 2), [[0, 1]])


@pytest.mark.parametrize("kind", ["token", "latent"])
def test_prompts_are_read_and_not_predicted(kind):
    objective = objectives()[kind]
    params = jax.jit(objective.init)(jax.random.key(0))
    both = jax.jit(jax.value_and_grad(lambda p, tokens: objective.loss(p, objective.frozen, tokens, jax.random.key(1), 0)[0]))

    def loss(tokens: np.ndarray) -> float:
        return float(both(params, jnp.asarray(tokens))[0])

    value = loss(PROMPTED)
    assert abs(value - loss(TOKENS)) > 1e-4
    # the prompt's last chunk is read ...
    other = PROMPTED.copy()
    other[:, 3] = ~((~other[:, 3] + 1) % 24)
    assert loss(other) != value
    # ... and without anything that counts there is nothing to learn
    silent, gradients = both(params, jnp.asarray(~TOKENS))
    assert float(silent) == 0 and all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients))


def test_the_token_loss_is_the_mean_over_responses():
    objective = objectives()["token"]
    params = jax.jit(objective.init)(jax.random.key(0))
    lm = objective.module(params)
    nats, _ = lm.nats_and_match(lm.hidden(jnp.asarray(TOKENS[:, :-1, None]))[0], jnp.asarray(TOKENS[:, 1:]))
    expected = np.asarray(nats)[PROMPTED[:, 1:] >= 0].mean()
    np.testing.assert_allclose(objective.loss(params, {}, jnp.asarray(PROMPTED), jax.random.key(0))[0], expected, rtol=1e-5)
