"""Signs of collapse: the measures against their definitions, and on a model that was made to collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.evaluate.geometry import effective_rank
from calm.token.collapse import collapse_measures
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenObjective

SMALL = TokenLMConfig(vocab_size=24, backbone=BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=24))
BLOCKS = np.random.default_rng(0).integers(0, 24, (5, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def split_model():
    objective = TokenObjective(SMALL, context=16)
    return nnx.split(objective.module(jax.jit(objective.init)(jax.random.key(0))))


def test_the_measures_are_their_definitions(split_model):
    graph, params = split_model
    lm = nnx.merge(graph, params)

    @jax.jit
    def states(params):
        lm = nnx.merge(graph, params)
        hidden = lm.hidden(jnp.asarray(BLOCKS)[..., None])[0].reshape(-1, 16)
        return hidden, lm.logits(hidden)

    hidden, logits = (np.asarray(x, np.float64) for x in states(params))
    log_z = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - log_z[:, None])
    entropy = -(p * np.log(p)).sum(-1).mean()
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    expected = {
        "effective_rank": effective_rank(np.cov(hidden.T, bias=True)),
        "alignment": cosines[~np.eye(len(hidden), dtype=bool)].mean(),
        "information": -(p.mean(0) * np.log(p.mean(0))).sum() - entropy,
        "log_z": np.sqrt((log_z**2).mean()),
        "logit_spread": logits.std(-1).mean(),
    }
    found = collapse_measures(lm, BLOCKS, batch_size=2)  # 5 blocks: the last batch is not full
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert found["effective_rank"] > 3 and found["information"] > 0.1


def test_a_model_that_reads_every_token_as_the_same_is_seen_to_have_collapsed(split_model):
    graph, params = split_model
    lm = nnx.merge(graph, params)
    lm.stem.table[...] = jnp.broadcast_to(lm.stem.table[...][:1], lm.stem.table[...].shape)
    found = collapse_measures(lm, BLOCKS)
    assert found["alignment"] == pytest.approx(1, abs=1e-4)
    assert found["information"] == pytest.approx(0, abs=1e-4)
    assert found["effective_rank"] < 3 or found["logit_spread"] < 1e-4
    assert found["log_z"] > 0
