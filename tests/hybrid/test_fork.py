"""Branches of a sequence: each is what a copy of the state, rewound to its end, computes step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.backbone import BackboneConfig
from calm.core.dense import PRECISIONS
from calm.errors import UsageError
from random_models import normal, random_model

CONFIG = BackboneConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, inner_dim=24)
BATCH, LENGTH, BRANCHES, DEPTH = 2, 7, 3, 3
ENDS = np.array([2, 5, 7])
TRUNK = normal(BATCH, LENGTH, CONFIG.dim)
OWN = normal(DEPTH, BATCH, len(ENDS), BRANCHES, CONFIG.dim, seed=1)
STARTS = jnp.array([0, 1])


@jax.jit
def along(backbone, trunk, own):
    """All branches at once, `[DEPTH B A S D]`."""
    _, state = backbone(trunk, backbone.init_state(BATCH, LENGTH + 2, STARTS))
    state, parts = backbone.fork(state, jnp.asarray(ENDS), BRANCHES, DEPTH + 1), []
    for block in own:
        part, state = backbone(block.reshape(BATCH, -1, CONFIG.dim), state)
        parts.append(part.reshape(block.shape))
    return jnp.stack(parts), state


@jax.jit
def alone(backbone, trunk, steps):
    """One branch of every row: the trunk up to its end, then its own steps `[DEPTH B D]`."""
    _, state = backbone(trunk, backbone.init_state(BATCH, LENGTH + DEPTH, STARTS))
    parts = []
    for hidden in steps:
        part, state = backbone(hidden[:, None], state)
        parts.append(part[:, 0])
    return jnp.stack(parts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_branch_is_a_rewound_copy_that_reads_on(precision):
    backbone = random_model(CONFIG, precision=precision)
    together, state = along(backbone, TRUNK, OWN)
    for a, end in enumerate(ENDS):
        for branch in (0, BRANCHES - 1):
            expected = alone(backbone, TRUNK[:, :end], OWN[:, :, a, branch])
            got = together[:, :, a, branch]
            np.testing.assert_allclose(got, expected, atol=1e-5 if precision == "float32" else 3e-2)
    assert state.window.depth == DEPTH and state.layers.own.keys.shape[3:5] == (len(ENDS) * BRANCHES, DEPTH + 1)


def test_branches_see_neither_each_other_nor_what_follows_their_end():
    backbone = random_model(CONFIG)
    before, _ = along(backbone, TRUNK, OWN)
    changed, own = TRUNK.copy(), OWN.copy()
    changed[:, 5:] += 1.0
    own[:, :, 0, 1:] += 1.0
    after, _ = along(backbone, changed, own)
    np.testing.assert_array_equal(before[:, :, 0, 0], after[:, :, 0, 0])
    np.testing.assert_array_equal(before[:, :, 1], after[:, :, 1])
    assert (np.abs(before - after)[:, :, 0, 1:].max(-1) > 1e-3).all()


def test_a_fork_cannot_be_forked():
    backbone = random_model(CONFIG)
    state = backbone.fork(backbone.init_state(BATCH, LENGTH), jnp.asarray(ENDS), 1, 1)
    with pytest.raises(UsageError, match="state of a sequence"):
        backbone.fork(state, jnp.asarray(ENDS), 1, 1)
