"""The token baseline learns what it is told to, and its score of held-out text is its own loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.errors import UsageError
from calm.models import TokenLMConfig
from calm.nn import BackboneConfig
from calm.train.token_likelihood import token_likelihood
from calm.train.token_objective import TokenObjective

SMALL = TokenLMConfig(vocab_size=24, backbone=BackboneConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=24))
TOKENS = np.random.default_rng(0).integers(3, 24, (4, 16)).astype(np.int32)
DOCUMENTS = np.arange(4)


@pytest.fixture(scope="module")
def trained():
    """An objective and parameters, after some steps on sequences in which each token is the one before it plus 1."""
    objective = TokenObjective(SMALL, context=16)
    params = jax.jit(objective.init)(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state, start = optimizer.init(params), jax.random.randint(jax.random.key(1), (60, 8, 1), 0, 24)

    @jax.jit
    def step(params, state, tokens):
        (_, terms), gradients = jax.value_and_grad(objective.loss, has_aux=True)(params, {}, tokens, jax.random.key(0))
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, terms["cross_entropy"]

    losses = []
    for first in start:
        params, state, nats = step(params, state, (first + jnp.arange(16)) % 24)
        losses.append(float(nats))
    return objective, params, losses


def test_it_learns_a_sequence_that_follows_from_its_last_token(trained):
    _, _, losses = trained
    assert losses[0] > 2.5 and losses[-1] < 0.5


def test_its_loss_is_its_likelihood_of_held_out_text(trained):
    objective, params, _ = trained
    loss, terms = jax.jit(objective.loss)(params, {}, jnp.asarray(TOKENS), jax.random.key(0))
    sums = token_likelihood(objective.module(params), TOKENS, DOCUMENTS)
    assert loss == terms["cross_entropy"]
    np.testing.assert_allclose(sums.means[0], loss, rtol=1e-5)
    np.testing.assert_array_equal(sums.count, 15)


def test_skipped_tokens_are_read_and_not_scored(trained):
    """With K - 1 more tokens skipped the model is scored where a model of chunks of K is."""
    lm = trained[0].module(trained[1])
    every, some = (token_likelihood(lm, TOKENS, DOCUMENTS, skip=skip) for skip in (1, 4))
    first = token_likelihood(lm, TOKENS[:, :4], DOCUMENTS)
    np.testing.assert_allclose(every.total, first.total + some.total, rtol=1e-5)
    assert some.count.sum() == 4 * 12
    with pytest.raises(UsageError, match="skip"):
        token_likelihood(lm, TOKENS, DOCUMENTS, skip=16)


def test_flops_count_forward_and_backward():
    assert TokenObjective(SMALL, context=16).flops_per_token() == 3 * SMALL.flops(16)
