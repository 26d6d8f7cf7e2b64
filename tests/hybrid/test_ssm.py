"""The selective state-space model: the laws of a mixer, and stability whatever the weights and the input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mixer_laws as laws
from calm.core.dense import PRECISIONS
from calm.core.mixer import Window
from calm.errors import UsageError
from calm.hybrid.state_space import MIN_DECAY, RATE, SPANS, SSMConfig

CONFIG = SSMConfig(state_dim=4, num_heads=4, conv_kernel=3)


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


@pytest.mark.parametrize("config", [SSMConfig(), CONFIG])
def test_costs(config):
    laws.costs_are_those_of_what_is_built(config)


def with_weights(**values: float):
    mixer = laws.built(CONFIG)
    graph, weights = nnx.split(mixer)
    flat = [
        (path, variable.replace(jnp.full_like(variable.get_value(), values[path[-1]])) if path[-1] in values else variable)
        for path, variable in nnx.to_flat_state(weights)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e10])
@pytest.mark.parametrize("forget_bias", [-1e4, 0.0, 1e4])
def test_a_state_is_bounded_whatever_is_read_and_whatever_was_learned(scale, forget_bias):
    """|a| < 1 in float32 even where the gate is shut, and |h| <= max |b x| / (1 - a)."""
    mixer = with_weights(forget_bias=forget_bias, log_rate=-200.0 if forget_bias < 0 else 3.0)
    state = mixer.init_state(laws.BATCH, laws.LENGTH, rewindable=True)
    hidden, largest = laws.HIDDEN * np.float32(scale), 0.0
    for offset in (0, 0, 0):  # the same block again: the memory goes on from where it was
        out, state = laws.CALL(mixer, hidden, state, laws.window(offset))
        decay = np.exp(state.gates.log_decay[:, : laws.LENGTH])
        assert (decay < 1).all() and (decay >= 0).all() and decay.max() <= np.exp(-MIN_DECAY) + 1e-7
        assert np.isfinite(out).all() and np.isfinite(state.memory).all()
        x, b, _ = mixer._parts(mixer.conv.over(state.conv.inputs))
        largest = max(largest, np.abs(x).max() * np.abs(b).max())
        assert np.abs(state.memory).max() <= largest / -np.expm1(-MIN_DECAY)


def test_a_memory_scales_with_what_is_written():
    """b and c are normed: the scale of the input enters once. Ten times the convolved inputs, ten times x and the same b, c."""
    mixer = laws.built(CONFIG)
    read = 5 + np.random.default_rng(0).random((2, 3, 16 + 8), np.float32)  # where SiLU is the identity within 4 %
    (x, b, c), (x_10, b_10, c_10) = mixer._parts(jnp.asarray(read)), mixer._parts(jnp.asarray(10 * read))
    np.testing.assert_allclose(x_10, 10 * x, rtol=0.01)
    np.testing.assert_allclose(b_10, b, atol=0.02)
    np.testing.assert_allclose(c_10, c, atol=0.02)


def test_heads_begin_with_memories_from_one_position_to_a_thousand():
    mixer = CONFIG.build(laws.DIM, rngs=nnx.Rngs(0))
    rate = np.exp(mixer.log_rate[...]) * jax.nn.sigmoid(mixer.forget_bias[...])
    np.testing.assert_allclose(1 / rate, np.geomspace(*SPANS, 4), rtol=1e-4)
    np.testing.assert_allclose(np.exp(mixer.log_rate[...]), RATE, rtol=1e-6)
    gate, decay = jax.nn.sigmoid(mixer.in_bias[...]), np.exp(-rate)
    np.testing.assert_allclose(gate**2 / (1 - decay**2), 1.0, rtol=1e-3)


def test_gates_depend_on_the_input_and_every_weight_learns():
    mixer = laws.built(CONFIG)
    _, state = laws.CALL(mixer, laws.HIDDEN, mixer.init_state(laws.BATCH, laws.LENGTH, rewindable=True), laws.window())
    assert (np.std(state.gates.log_decay, axis=1) > 1e-4).all() and (np.std(state.gates.gate_in, axis=1) > 1e-3).all()
    graph, weights = nnx.split(mixer)
    hidden = jnp.asarray(laws.HIDDEN)
    slope = jax.jit(jax.grad(lambda weights: (nnx.merge(graph, weights)(hidden, None, laws.window())[0] ** 3).sum()))
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(slope(weights)))


def test_a_memory_reaches_further_than_the_convolution():
    mixer, changed = laws.built(CONFIG), laws.HIDDEN.copy()
    changed[:, 2] += 1.0
    out = [laws.CALL(mixer, x, None, laws.window())[0] for x in (laws.HIDDEN, changed)]
    assert (np.abs(out[0] - out[1])[:, 20:].max(-1) > 1e-5).all()


def test_padding_of_one_row_alone_is_still_finite():
    mixer = laws.built(CONFIG)
    at = Window(jnp.int32(0), jnp.array([laws.LENGTH, 0], jnp.int32))
    out, state = laws.CALL(mixer, laws.HIDDEN, mixer.init_state(laws.BATCH, laws.LENGTH), at)
    assert np.isfinite(out).all() and (state.memory[0] == 0).all() and (state.conv.inputs[0] == 0).all()


@pytest.mark.parametrize("changes", [{"state_dim": 0}, {"expand": 0}, {"num_heads": 0}, {"conv_kernel": 1}])
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(UsageError, match="must be at least 1 and conv_kernel at least 2"):
        dataclasses.replace(CONFIG, **changes)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match="num_heads=5 must divide the inner width 16"):
        SSMConfig(num_heads=5).build(laws.DIM, rngs=nnx.Rngs(0))
