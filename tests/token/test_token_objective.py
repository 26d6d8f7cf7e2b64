"""The token baseline learns what it is told to, and its score of held-out text is its own loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.core.backbone import BackboneConfig
from calm.errors import UsageError
from calm.token.hidden_flow import HiddenFlow
from calm.token.likelihood import sliding_likelihood, token_likelihood, windows
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenLossConfig, TokenObjective

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


@pytest.mark.parametrize(("length", "window", "stride"), [(16, 16, 4), (17, 16, 4), (37, 8, 3), (40, 8, 7), (24, 8, 1)])
def test_windows_score_every_token_but_the_first_once(length, window, stride):
    starts, first = windows(length, window, stride)
    scored = np.concatenate([np.arange(start + at, start + window) for start, at in zip(starts, first, strict=True)])
    np.testing.assert_array_equal(scored, np.arange(1, length))
    assert (first[1:] >= window - stride).all() and first[0] == 1


def test_a_sliding_window_is_the_likelihood_of_each_token_in_its_window(trained):
    lm, text = trained[0].module(trained[1]), TOKENS.reshape(-1)
    sums, rows, first = sliding_likelihood(lm, text, np.array([0, 30]), window=16, stride=6)
    assert sums.count.sum() == len(text) - 1
    for row, at, total in zip(rows, first, sums.total, strict=True):
        alone = token_likelihood(lm, row[None], np.zeros(1, int), skip=int(at))
        np.testing.assert_allclose(total, alone.total[0], rtol=1e-4)
    np.testing.assert_array_equal(sums.document, [0, 0, 0, 0, 1, 1, 1, 1, 1])  # the fifth scores tokens from 34 on
    with pytest.raises(UsageError, match="stride: must lie in 1..15"):
        sliding_likelihood(lm, text, np.zeros(1, int), window=16, stride=16)
    with pytest.raises(UsageError, match="fewer than one window"):
        sliding_likelihood(lm, text[:9], np.zeros(1, int), window=16, stride=4)


def test_flops_count_forward_and_backward():
    assert TokenObjective(SMALL, context=16).flops_per_token() == 3 * SMALL.flops(16)


REGULARISED = {
    "smoothing": TokenLossConfig(label_smoothing=0.2),
    "z": TokenLossConfig(z_weight=0.01),
    "all": TokenLossConfig(label_smoothing=0.2, z_weight=0.01, flow_weight=0.5),
}


@pytest.fixture(scope="module")
def begun():
    """The objective with all regularisers, and what it begins with."""
    objective = TokenObjective(SMALL, REGULARISED["all"], context=16)
    return objective, jax.jit(objective.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def log_probs(trained):
    def log_probs(params, tokens):
        lm = trained[0].module(params)
        return jax.nn.log_softmax(lm.logits(lm.hidden(tokens[:, :-1, None])[0]))

    return jax.jit(log_probs)(trained[1], jnp.asarray(TOKENS))


def loss_of(objective, params, tokens=TOKENS):
    value, terms = jax.jit(objective.loss)(params, {}, jnp.asarray(tokens), jax.random.key(0))
    return float(value), {name: float(term) for name, term in terms.items()}


@pytest.mark.parametrize("name", REGULARISED)
def test_the_loss_is_the_cross_entropy_and_its_regularisers(trained, begun, log_probs, name):
    loss = REGULARISED[name]
    params = {"lm": trained[1], "flow": begun[1]["flow"]} if loss.flow_weight else trained[1]
    value, terms = loss_of(TokenObjective(SMALL, loss, context=16), params)
    plain = -jnp.take_along_axis(log_probs, jnp.asarray(TOKENS)[:, 1:, None], -1).mean()
    np.testing.assert_allclose(terms["cross_entropy"], plain, rtol=1e-5)
    weights = {"smoothing": loss.label_smoothing, "z": loss.z_weight, "flow": loss.flow_weight}
    assert set(terms) == {"cross_entropy", *(term for term, weight in weights.items() if weight)}
    added = sum(weight * terms[term] for term, weight in weights.items() if weight)
    np.testing.assert_allclose(value, plain + added, rtol=1e-5)
    if loss.label_smoothing:  # (1 - e) times the text's tokens, e times all of them
        np.testing.assert_allclose(plain + 0.2 * terms["smoothing"], 0.8 * plain - 0.2 * log_probs.mean(), rtol=1e-5)


def test_without_weights_it_is_the_plain_objective_to_the_bit(trained):
    objective = TokenObjective(SMALL, TokenLossConfig(), context=16)
    fresh = jax.eval_shape(objective.init, jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(trained[1])
    assert objective.lm_params(fresh) is fresh
    assert loss_of(objective, trained[1]) == loss_of(trained[0], trained[1])


def test_the_flow_is_trained_beside_the_model_and_counts_its_flops(begun):
    objective, params = begun
    assert set(params) == {"lm", "flow"}
    plain = jax.jit(TokenObjective(SMALL, context=16).init)(jax.random.key(0))
    for ours, theirs in zip(jax.tree.leaves(objective.lm_params(params)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # the same model to begin with, with the flow or without
    gradients, _ = jax.jit(jax.grad(objective.loss, has_aux=True))(params, {}, jnp.asarray(TOKENS), jax.random.key(0))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients["flow"])) > 0
    assert objective.flops_per_token() == 3 * (SMALL.flops(16) + HiddenFlow.flops(16))


def test_the_flow_leaves_out_states_that_only_read(begun):
    """A state behind a token that does not count is no target: only the last token is predicted, and none is read after it."""
    objective, params = begun
    masked = TOKENS.copy()
    masked[:, :15] = ~masked[:, :15]
    assert loss_of(objective, params, masked)[1]["flow"] == 0
    assert loss_of(objective, params)[1]["flow"] > 0.1


@pytest.mark.parametrize(
    "values", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_weight": -1.0}, {"flow_weight": -1.0}]
)
def test_nonsense_regularisers_cannot_be_configured(values):
    with pytest.raises(UsageError, match=f"loss: {next(iter(values))}"):
        TokenLossConfig(**values)
