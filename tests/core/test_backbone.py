"""The backbone: three equal modes, nothing from the future, padding that is not there."""

import dataclasses

import jax
import numpy as np
import pytest

from calm.core.backbone import BackboneConfig
from calm.core.dense import PRECISIONS
from calm.errors import UsageError
from random_models import normal, random_model

CONFIG = BackboneConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, inner_dim=24)
BATCH, LENGTH = 2, 6
HIDDEN = normal(BATCH, LENGTH, CONFIG.dim)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_future_does_not_reach_the_past(precision):
    backbone = random_model(CONFIG, precision=precision)
    run = jax.jit(lambda hidden: backbone(hidden)[0])
    before, changed = run(HIDDEN), HIDDEN.copy()
    changed[:, 4:] += 1.0
    after = run(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_sequence_blocks_and_single_steps_are_equal(precision):
    backbone = random_model(CONFIG, precision=precision)
    whole, none = jax.jit(lambda hidden: backbone(hidden))(HIDDEN)
    step = jax.jit(lambda hidden, state: backbone(hidden, state))
    assert none is None
    state, parts = backbone.init_state(BATCH, LENGTH + 3), []
    for block in np.split(HIDDEN, [3, 4, 5], axis=1):  # a block of three, then steps
        part, state = step(block, state)
        parts.append(part)
    assert state.window.offset == LENGTH
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5 if precision == "float32" else 2e-2)


def test_left_padding_does_not_change_a_row():
    backbone, starts = random_model(CONFIG), np.array([0, 3], np.int32)
    run = jax.jit(lambda hidden, starts: backbone(hidden, backbone.init_state(hidden.shape[0], LENGTH, starts))[0])
    padded = HIDDEN.copy()
    padded[1, :3] = 1e3  # what stands in the padding has no say
    together = run(padded, starts)
    np.testing.assert_allclose(together[0], run(HIDDEN, np.zeros(2, np.int32))[0], atol=1e-5)
    alone = jax.jit(lambda hidden: backbone(hidden)[0])(HIDDEN[1:, 3:])
    np.testing.assert_allclose(together[1, 3:], alone[0], atol=1e-5)


def test_a_state_can_be_rewound():
    backbone = random_model(CONFIG)
    step = jax.jit(lambda hidden, state: backbone(hidden, state))
    _, kept = step(HIDDEN[:, :2], backbone.init_state(BATCH, LENGTH))
    first, _ = step(HIDDEN[:, 2:4], kept)
    step(HIDDEN[:, 4:6], kept)
    np.testing.assert_array_equal(step(HIDDEN[:, 2:4], kept)[0], first)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_reaches_the_stack(remat):
    """That it changes no value and no gradient is a law of the stack."""
    backbone = random_model(dataclasses.replace(CONFIG, remat=remat))
    assert ("remat" in str(jax.make_jaxpr(lambda hidden: backbone(hidden)[0])(HIDDEN))) == remat


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dim": 0}, "dim, num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 3}, "num_heads=3 must divide dim=16"),
        ({"num_heads": 16, "num_kv_heads": 16}, "even head widths"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(CONFIG, **sizes)
