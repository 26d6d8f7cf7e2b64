"""Taps read and replace what passes through a backbone, in a scan too, and by default do nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.dense import Dense
from calm.core.unrolled import unrolled
from calm.errors import UsageError
from calm.hybrid.hopfield import HopfieldConfig
from calm.hybrid.taps import chain, mask_paths, replace_controller, shuffle_input, tapped
from hybrid_models import CONFIGS, built, hidden, whole
from random_models import Layer, random_model

HIDDEN = hidden(2, 5)
SLOTS = HopfieldConfig(num_slots=3, num_heads=2)
CONFIG = dataclasses.replace(CONFIGS["reasoner"], pattern="CH", num_segments=1, hopfield=SLOTS)
MODEL = built(CONFIG)


@pytest.fixture(autouse=True)
def layers_are_a_loop(monkeypatch):
    monkeypatch.setattr("calm.core.stack.MAX_UNROLLED", 1)


def readings(*names, taps=None, model=MODEL):
    return jax.jit(lambda model: model.readings(HIDDEN, names, taps))(model)


def run(taps):
    return jax.jit(lambda model: model(HIDDEN, taps=taps)[0])(MODEL)


def test_readings_are_what_passes_through_each_layer():
    found = readings(*CONFIG.tap_names)
    assert CONFIG.tap_names == ("input.C", "path.C", "input.H", "path.H", "gate", "hidden")
    assert all(list(values) == [0, 1] for values in found.values())
    np.testing.assert_allclose(found["gate"][1].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(MODEL.norm(found["hidden"][1]), whole(MODEL, HIDDEN), atol=1e-6)
    np.testing.assert_array_equal(found["input.C"][0], found["input.H"][0])
    apart = readings("path.C", model=unrolled(MODEL))["path.C"]
    np.testing.assert_allclose(apart[1], found["path.C"][1], atol=1e-6)


def test_a_tap_can_mean_one_layer():
    def tap(name, layer, value):
        return jnp.where(layer == 1, 0.0, value) if name == "path.C" else value

    plain, changed = readings("hidden", "path.C"), readings("hidden", "path.C", taps=tap)
    np.testing.assert_array_equal(plain["hidden"][0], changed["hidden"][0])
    np.testing.assert_array_equal(changed["path.C"][1], 0)
    assert plain["path.C"][1].any() and np.abs(plain["hidden"][1] - changed["hidden"][1]).max() > 1e-3


def test_a_masked_path_is_not_heard():
    """Whatever it says; and what is left has its own share or, renormalised, all of it."""
    loud = chain(lambda name, layer, value: value + 10.0 if name == "path.C" else value)
    for renormalise in (False, True):
        masked = mask_paths(CONFIG.groups, "C", renormalise=renormalise)
        np.testing.assert_allclose(run(chain(loud, masked)), run(masked), atol=1e-6)
        share = readings("gate", taps=masked)["gate"][0][..., 1]
        assert (np.abs(share - 1).max() < 1e-6) == renormalise
    assert np.abs(run(loud) - run(None)).max() > 1e-3


def test_a_pattern_of_several_groups_is_masked_group_by_group():
    groups = ("CHA", "HG")
    tap = mask_paths(groups, "H", renormalise=True)
    shares = jnp.full((1, 1, 3), 1 / 3)
    np.testing.assert_allclose(tap("gate", jnp.int32(2), shares)[0, 0], [0.5, 0, 0.5])
    np.testing.assert_allclose(tap("gate", jnp.int32(3), jnp.array([[[0.2, 0.8]]]))[0, 0], [0, 1])


def test_shuffling_moves_one_paths_input_in_time():
    """A memory of slots knows no positions: its path gives the same in another order; the other path is left alone."""
    order = jnp.array([3, 0, 4, 1, 2])
    plain = readings("path.H", "path.C")
    moved = readings("path.H", "path.C", taps=shuffle_input("H", order))
    np.testing.assert_allclose(moved["path.H"][0], plain["path.H"][0][:, order], atol=1e-6)
    np.testing.assert_array_equal(moved["path.C"][0], plain["path.C"][0])


def test_a_tapped_copy_is_changed_wherever_it_is_called_and_the_original_is_not():
    tap = mask_paths(CONFIG.groups, "C", renormalise=False)
    plain = whole(MODEL, HIDDEN)
    copy = tapped(MODEL, tap)
    np.testing.assert_allclose(whole(copy, HIDDEN), run(tap), atol=1e-6)
    np.testing.assert_allclose(whole(unrolled(copy), HIDDEN), run(tap), atol=1e-6)
    np.testing.assert_array_equal(whole(MODEL, HIDDEN), plain)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: mask_paths(("SH",), "A", renormalise=False), "no path A in pattern 'SH'"),
        (lambda: mask_paths(("SH", "C"), "C", renormalise=True), "nothing is left of group 'C' to renormalise"),
        (lambda: replace_controller("none"), "kind must be zero, shuffled or random, got 'none'"),
        (lambda: replace_controller("random"), "kind 'random' needs a key"),
        (lambda: MODEL.readings(HIDDEN, ("gates",)), "no tap is called 'gates'; there are input.C"),
        (lambda: tapped(random_model(Layer(lambda rngs: Dense(2, 2, rngs=rngs))), chain()), "the module has no backbone"),
    ],
)
def test_what_cannot_be_tapped_is_refused(wrong, words):
    with pytest.raises(UsageError, match=words):
        wrong()
