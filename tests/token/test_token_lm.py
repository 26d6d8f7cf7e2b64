"""The token baseline: laws of its stem, backbone and softmax, and that what it draws is what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.core.cross_entropy import plain_cross_entropy
from calm.core.decoder import ScoringTable
from calm.core.predictor import Noise, Predictor, sample_chunks
from calm.errors import UsageError
from calm.token.model import TokenLMConfig
from jaxpr_flops import matmul_flops
from random_models import random_model

BACKBONE = BackboneConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12)
TIED = TokenLMConfig(vocab_size=70, backbone=BACKBONE)
KINDS = {
    "tied": TIED,
    "two tables": dataclasses.replace(TIED, tied=False),
    "narrow table": dataclasses.replace(TIED, table_dim=6),
    "two narrow tables": dataclasses.replace(TIED, table_dim=6, tied=False),
}
TOKENS = np.random.default_rng(0).integers(0, 70, (2, 6, 1)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(KINDS["narrow table"])


def test_it_is_a_predictor_of_chunks_of_one_token(model):
    assert isinstance(model, Predictor) and model.chunk_size == 1 and model.vocab_size == 70


def test_later_tokens_do_not_change_earlier_hidden_states_and_earlier_ones_do_change_later(model):
    run = jax.jit(lambda tokens: model.hidden(tokens)[0])
    before, later, first = run(TOKENS), TOKENS.copy(), TOKENS.copy()
    later[:, 3:] = (later[:, 3:] + 1) % 70
    np.testing.assert_array_equal(run(later)[:, :3], before[:, :3])
    first[:, 0] = (first[:, 0] + 1) % 70
    assert (np.abs(run(first) - before).max(-1) > 1e-5).all()


def test_generation_continues_a_left_padded_batch_as_each_row_alone(model):
    whole = jax.jit(lambda tokens: model.hidden(tokens)[0])
    step = jax.jit(lambda tokens, state: model.hidden(tokens, state))
    padded = TOKENS.copy()
    padded[1, :2] = 7
    state, parts = model.init_state(2, 8, jnp.asarray([0, 2], jnp.int32)), []
    for block in np.split(padded, [4, 5], axis=1):
        part, state = step(block, state)
        parts.append(part)
    together = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(together[0], whole(TOKENS)[0], atol=1e-5)
    np.testing.assert_allclose(together[1, 2:], whole(TOKENS[1:, 2:])[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_products_in_the_program(kind):
    config = KINDS[kind]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))

    def forward(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.logits(model.hidden(tokens)[0])

    assert matmul_flops(forward, params, jax.ShapeDtypeStruct((1, 6, 1), jnp.int32)) == 6 * config.flops(6)


def test_sharing_or_narrowing_the_table_saves_its_weights():
    parameters = {kind: config.parameters() for kind, config in KINDS.items()}
    assert parameters["two tables"] - parameters["tied"] == 70 * 8
    assert parameters["two narrow tables"] - parameters["narrow table"] == 70 * 6
    assert parameters["tied"] - parameters["narrow table"] == 70 * 2 - 2 * 6 * 8


def test_its_likelihood_is_the_softmax_of_its_logits(model):
    hidden = model.hidden(jnp.asarray(TOKENS))[0][:, :-1]
    targets = jnp.asarray(TOKENS[:, 1:, 0])
    nats, match = model.nats_and_match(hidden, targets)
    states = model.head(hidden).reshape(-1, 6)
    np.testing.assert_allclose(nats.reshape(-1), plain_cross_entropy(states, model.table, targets.reshape(-1)), rtol=1e-5)
    np.testing.assert_allclose(match, (jax.nn.softmax(model.logits(hidden)) ** 2).sum(-1), rtol=1e-5)


def test_draws_have_the_law_of_the_logits_and_never_name_a_banned_token(model):
    """Chi-square over tokens: 70 cells, 20000 draws; the 99.99 % quantile of 69 degrees of freedom is about 122."""
    hidden = model.hidden(jnp.asarray(TOKENS))[0][:1, -1]
    allowed = jnp.asarray(np.delete(np.arange(70), [3, 41]), jnp.int32)
    table = ScoringTable.of(model.table, "float32", allowed)
    logits = model.logits(hidden, table)[0]
    assert np.isneginf(logits[jnp.asarray([3, 41])]).all() and np.isfinite(logits[allowed]).all()
    for expected, scoring in ((jax.nn.softmax(logits), table), (jax.nn.softmax(model.logits(hidden)[0]), None)):
        previous = jnp.zeros((1, 0), jnp.int32)
        drawn = sample_chunks(model, jax.random.key(1), hidden, previous, 20_000, table=scoring)
        counts = np.bincount(np.asarray(drawn).reshape(-1), minlength=70)
        expected = 20_000 * np.asarray(expected, np.float64)
        cells = expected > 0
        assert counts[~cells].sum() == 0
        assert ((counts - expected)[cells] ** 2 / expected[cells]).sum() < 122


def test_a_draw_is_a_function_of_its_numbers_alone(model):
    hidden = model.hidden(jnp.asarray(TOKENS))[0][:, -1]
    uniforms = jax.random.uniform(jax.random.key(0), (5, 2, 1, 2))
    together = model.write(hidden, jnp.asarray(TOKENS[:, -1]), Noise(None, uniforms))
    for row in range(2):
        alone = model.write(
            hidden[row : row + 1], jnp.asarray(TOKENS[row : row + 1, -1]), Noise(None, uniforms[:, row : row + 1])
        )
        np.testing.assert_array_equal(together[:, row : row + 1], alone)


def test_many_rows_are_scored_and_drawn_as_few_are(model):
    """More rows than are taken at a time."""
    hidden = jnp.asarray(np.random.default_rng(1).standard_normal((440, 8), np.float32))
    uniforms = jax.random.uniform(jax.random.key(0), (2, 440, 1, 2))
    targets = jnp.arange(440) % 70

    @jax.jit
    def both(hidden, targets, uniforms):
        return *model.nats_and_match(hidden, targets), model.write(hidden, targets[:, None], Noise(None, uniforms))[..., 0].T

    few = slice(396, 404)
    for every, some in zip(both(hidden, targets, uniforms), both(hidden[few], targets[few], uniforms[:, few]), strict=True):
        np.testing.assert_allclose(every[few], some, rtol=1e-5)


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match="vocab_size must be set"):
        TokenLMConfig().build(rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="table_dim must not be negative"):
        TokenLMConfig(table_dim=-1)
