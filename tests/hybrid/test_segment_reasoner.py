"""The reasoner: segments differ by the bias of the gates alone, and by nothing where the controller is silent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.hybrid.hopfield import HopfieldConfig
from calm.hybrid.taps import replace_controller
from hybrid_models import CONFIGS, built, hidden, whole

CONFIG = dataclasses.replace(CONFIGS["reasoner"], pattern="CA")
HIDDEN = hidden(2, 5)


@pytest.fixture(autouse=True)
def layers_are_a_loop(monkeypatch):
    monkeypatch.setattr("calm.core.stack.MAX_UNROLLED", 1)


def copied(model):
    return nnx.merge(*nnx.split(model))


def test_without_a_word_from_the_controller_every_segment_is_the_first():
    model = copied(built(dataclasses.replace(CONFIG, num_segments=3)))
    first = whole(model.stack, HIDDEN)
    assert np.abs(whole(model, HIDDEN) - first).max() > 1e-3
    for weights in (model.controller.out.kernel, model.controller.out.bias):
        weights[...] = jnp.zeros_like(weights[...])
    np.testing.assert_array_equal(whole(model, HIDDEN), first)


def test_a_new_controller_is_silent():
    slots = dataclasses.replace(CONFIG, pattern="CH", hopfield=HopfieldConfig(num_slots=2, num_heads=1))
    model = nnx.jit(lambda: slots.build(rngs=nnx.Rngs(0)))()
    assert not model.controller.out.kernel[...].any() and not model.controller.out.bias[...].any()
    assert model.controller.inner.kernel[...].any()


def test_the_last_segment_is_the_stack_under_the_controllers_bias():
    model = built(CONFIG)

    @jax.jit
    def by_hand(model, hidden):
        return model.stack(hidden, bias=model.controller(model.stack(hidden)[0]))[0]

    np.testing.assert_allclose(whole(model, HIDDEN), by_hand(model, HIDDEN), atol=1e-6)


@pytest.mark.parametrize("kind", ["one_step", "full"])
def test_the_gradient_is_that_of_the_last_segment_or_of_all(kind):
    graphdef, weights = nnx.split(built(dataclasses.replace(CONFIG, reasoner_gradient=kind)))

    def reasoner(weights):
        return jnp.sum(nnx.merge(graphdef, weights)(HIDDEN)[0] ** 3)

    def by_hand(weights, of_first):
        model = nnx.merge(graphdef, weights)
        read = nnx.merge(graphdef, of_first).stack(HIDDEN)[0]
        return jnp.sum(model.stack(HIDDEN, bias=model.controller(read))[0] ** 3)

    found = jax.jit(jax.grad(reasoner))(weights)
    last, first = jax.jit(jax.grad(by_hand, argnums=(0, 1)))(weights, weights)
    expected = last if kind == "one_step" else jax.tree.map(jnp.add, last, first)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, np.abs(other).max()))
    assert max(np.abs(x).max() for x in jax.tree.leaves(first)) > 1e-2  # what one step leaves out is not nothing


@jax.jit(static_argnums=1)
def run(model, taps):
    return model.readings(HIDDEN, ("controller", "hidden"), taps)


def test_to_a_tap_the_layers_of_the_second_segment_follow_those_of_the_first():
    def tap(name, layer, value):
        return jnp.where(layer == 3, 0.0, value) if name == "hidden" else value

    plain, changed = run(built(CONFIG), None)["hidden"], run(built(CONFIG), tap)["hidden"]
    for layer in range(3):
        np.testing.assert_array_equal(plain[layer], changed[layer])
    assert plain[3].any() and not changed[3].any()


def test_a_controller_can_be_replaced():
    model = built(CONFIG)
    key = jax.random.key(0)
    plain, zero, shuffled, noise = (
        run(model, tap)
        for tap in (None, replace_controller("zero"), replace_controller("shuffled", key), replace_controller("random", key))
    )
    assert list(plain["controller"]) == [2] and list(plain["hidden"]) == [0, 1, 2, 3]
    np.testing.assert_array_equal(zero["controller"][2], 0)
    np.testing.assert_array_equal(zero["hidden"][3], zero["hidden"][1])
    rows = [np.asarray(x["controller"][2]).reshape(10, -1) for x in (plain, shuffled, noise)]
    assert (rows[0] != rows[1]).any() and (np.sort(rows[0][:, 0]) == np.sort(rows[1][:, 0])).all()
    assert {tuple(row) for row in rows[0]} == {tuple(row) for row in rows[1]}  # whole positions change places
    spread = rows[0].std(0)
    assert (np.abs(rows[2].mean(0) - rows[0].mean(0)) < 1.5 * spread).all()
    assert 0.5 < (rows[2].std(0) / spread).mean() < 1.5
