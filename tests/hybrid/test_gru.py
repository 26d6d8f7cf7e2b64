"""The recurrent unit: the laws of a mixer, the equations of the paper, and a gradient written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_laws as laws
from calm.core.dense import PRECISIONS
from calm.errors import UsageError
from calm.hybrid.gru import GRUConfig, gru_scan
from random_models import normal

CONFIG = GRUConfig(width=6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_sequence_blocks_and_steps_are_equal(precision):
    laws.modes_are_equal(CONFIG, precision)


@pytest.mark.parametrize(
    "law",
    [
        laws.the_future_stays_away,
        laws.padding_leaves_no_trace,
        laws.branches_are_rewound_copies,
        laws.states_keep_their_size,
        laws.only_a_trail_goes_back,
    ],
)
def test_law(law):
    law(CONFIG)


@pytest.mark.parametrize("config", [GRUConfig(), GRUConfig(width=96)])
def test_costs(config):
    laws.costs_are_those_of_what_is_built(config)


def plain(inputs, here, first, kernel, bias):
    """The equations, one position after another, differentiated by jax."""
    memory, memories = first, []
    for x, keep in zip(inputs, here, strict=True):
        (u, r, n), (u_h, r_h, n_h) = jnp.split(x, 3, axis=-1), jnp.split(memory @ kernel, 3, axis=-1)
        u, r = jax.nn.sigmoid(u + u_h), jax.nn.sigmoid(r + r_h)
        memory = jnp.where(keep, u * memory + (1 - u) * jnp.tanh(n + r * (n_h + bias)), memory)
        memories.append(memory)
    return jnp.stack(memories)


def test_the_scan_is_the_equations_with_gradients():
    here = np.ones((5, 2, 1), bool)
    here[:2, 1] = False
    arguments = (normal(5, 2, 9), normal(2, 3, seed=1), normal(3, 9, seed=2), normal(3, seed=3))

    def run(f, *rest):
        value = jax.jit(lambda x, *z: f(x, jnp.asarray(here), *z, *rest))
        slope = jax.jit(jax.grad(lambda *z: jnp.sin(3 * value(*z)).sum(), (0, 1, 2, 3)))
        return value(*arguments), *slope(*arguments)

    for ours, theirs in zip(run(gru_scan, "float32"), run(plain), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_memory_stays_below_one_whatever_is_read():
    mixer = laws.built(CONFIG)
    for scale in (1.0, 1e4, 1e15):
        out, state = laws.CALL(mixer, laws.HIDDEN * np.float32(scale), mixer.init_state(laws.BATCH, 1), laws.window())
        assert np.isfinite(out).all() and (np.abs(state.memory) <= 1).all()


def test_the_width_is_the_models_without_one():
    assert GRUConfig().parameters(16) == GRUConfig(width=16).parameters(16) != GRUConfig(width=8).parameters(16)
    with pytest.raises(UsageError, match="width must be at least 1, got 0"):
        GRUConfig(width=0)
