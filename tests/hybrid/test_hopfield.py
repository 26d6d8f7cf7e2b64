"""Hopfield memory: energy falls, one refinement is attention, depths are weighed, and the mixer's modes are equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from calm.core.attention import ForkedState
from calm.core.dense import PRECISIONS
from calm.core.mixer import Fork, Window
from calm.errors import UsageError
from calm.hybrid.hopfield import HopfieldConfig, Memory, energy, read, refine
from jaxpr_flops import matmul_flops
from random_models import normal

DIM, BATCH, LENGTH = 8, 2, 6
HIDDEN = normal(BATCH, LENGTH, DIM)
ENERGY, REFINE = jax.jit(energy), jax.jit(refine)
READ = jax.jit(lambda query, memories, beta, gate: read(query, memories, beta, gate, "float32"))
CALL = jax.jit(lambda mixer, hidden, state, at, depths=None: mixer(hidden, state, at, depths))
SLOTS = HopfieldConfig(memory="slots", num_slots=5, num_heads=2, refinements=(3, 2))
CONTEXT = dataclasses.replace(SLOTS, memory="context")
BOTH = pytest.mark.parametrize("config", [SLOTS, CONTEXT], ids=["slots", "context"])


def array(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(normal(*shape, seed=seed))


def built(config: HopfieldConfig, precision: str = "float32"):
    return config.build(DIM, rngs=nnx.Rngs(0), precision=precision)


def window(batch: int = BATCH, offset: int = 0, starts: tuple[int, ...] | None = None) -> Window:
    return Window(jnp.asarray(offset, jnp.int32), jnp.asarray(starts or (0,) * batch, jnp.int32))


# -- the update -------------------------------------------------------------------------------------------------------


def exact_energy(query, patterns, beta):
    """The energy in double precision."""
    scores = beta * query @ patterns.T
    top = scores.max(-1, keepdims=True)
    return -(np.log(np.exp(scores - top).sum(-1)) + top[:, 0]) / beta + (query**2).sum(-1) / 2


@given(seed=st.integers(0, 2**16), log_beta=st.floats(-2, 3), spread=st.floats(0.1, 4))
def test_the_energy_never_rises(seed, log_beta, spread):
    generator, beta = np.random.default_rng(seed), float(np.float32(np.exp(log_beta)))
    patterns = generator.normal(size=(9, 6)).astype(np.float32)
    query = (spread * generator.normal(size=(20, 6))).astype(np.float32)
    before = exact_energy(np.float64(query), np.float64(patterns), beta)
    np.testing.assert_allclose(ENERGY(query, patterns, beta), before, rtol=1e-4, atol=1e-4)
    for _ in range(5):
        query = np.asarray(REFINE(query, patterns, beta))
        after = exact_energy(np.float64(query), np.float64(patterns), beta)
        assert (after <= before + 1e-5).all()
        before = after


def test_a_refinement_is_the_step_that_the_energy_asks_for():
    """q - refine(q) is the energy's gradient: so is every fixed point a place where the energy is flat."""
    patterns, query = array(5, 4, seed=1), array(3, 4, seed=2)
    gradient = jax.grad(lambda q: energy(q, patterns, 1.7).sum())(query)
    np.testing.assert_allclose(query - REFINE(query, patterns, 1.7), gradient, atol=1e-5)


def test_one_refinement_is_attention_over_the_patterns():
    patterns, query, beta = array(5, 4, seed=1), array(3, 4, seed=2), 0.7
    stored = patterns[None, :, None]
    attended = jax.nn.dot_product_attention(query[None, :, None], stored, stored, scale=beta)[0, :, 0]
    np.testing.assert_allclose(REFINE(query, patterns, beta), attended, atol=1e-6)


def test_depth_k_reads_what_k_minus_one_refinements_left():
    patterns, values, query, beta = array(5, 4, seed=1), array(5, 4, seed=2), array(3, 4, seed=3), 2.0
    shares = [0.5, 0.2, 0.3]
    expected, state = np.zeros((3, 4)), query
    for share in shares:
        scores = np.exp(beta * np.asarray(state) @ np.asarray(patterns).T)
        expected += share * (scores / scores.sum(-1, keepdims=True)) @ np.asarray(values)
        state = REFINE(state, patterns, beta)
    gate = jnp.tile(jnp.array(shares), (3, 1))
    np.testing.assert_allclose(READ(query, [Memory(patterns, values)], beta, gate), expected, atol=1e-5)


def test_a_memory_in_two_parts_is_the_memory():
    """The second part is held once for each query, as the positions of a branch are."""
    keys, values, query = array(5, 4, seed=1), array(5, 4, seed=2), array(3, 4, seed=3)
    gate = jnp.full((3, 2), 0.5)
    parts = [Memory(keys[:2], values[:2]), Memory(*(jnp.broadcast_to(x[2:], (3, 3, 4)) for x in (keys, values)))]
    together = READ(query, [Memory(keys, values)], 1.0, gate)
    np.testing.assert_allclose(READ(query, parts, 1.0, gate), together, atol=1e-6)


# -- depths -----------------------------------------------------------------------------------------------------------


def test_depths_are_tiled_over_the_layers():
    config = HopfieldConfig(refinements=(3, 2, 2, 1))
    assert config.layer_constants(6).sum(-1).tolist() == [3, 2, 2, 1, 3, 2] and config.layer_constants(6)[3].tolist() == [
        True,
        False,
        False,
    ]


@BOTH
def test_a_layer_of_one_depth_does_not_refine(config):
    """Its gate is left with the first depth, whatever else is computed."""
    deep, flat = built(config), built(dataclasses.replace(config, refinements=(1,)))
    graph, _ = nnx.split(flat)
    weights = {path: variable for path, variable in nnx.to_flat_state(nnx.state(deep)) if path[0] != "gate"}
    flat = nnx.merge(graph, nnx.from_flat_state(list(weights.items())))
    first = config.layer_constants(1)[0] & np.array([True, False, False])
    masked, _ = CALL(deep, HIDDEN, None, window(), jnp.asarray(first))
    np.testing.assert_allclose(masked, CALL(flat, HIDDEN, None, window())[0], atol=1e-6)
    assert np.abs(masked - CALL(deep, HIDDEN, None, window())[0]).max() > 1e-3
    shares = deep.shares(jnp.asarray(HIDDEN), jnp.array([True, True, False]))
    np.testing.assert_allclose(shares.sum(-1), 1.0, atol=1e-6)
    assert (shares[..., 2] == 0).all() and (shares[..., :2] > 0).all()


# -- the mixer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@BOTH
def test_whole_sequence_blocks_and_steps_are_equal(config, precision):
    mixer = built(config, precision)

    def whole(hidden):
        return CALL(mixer, hidden, None, window())[0]

    def parts(hidden):
        state, at, found = mixer.init_state(BATCH, LENGTH + 2), window(), []
        for block in jnp.split(hidden, [3, 4, 5], axis=1):
            part, state = CALL(mixer, block, state, at)
            found.append(part)
            at = at.after(block.shape[1])
        return jnp.concatenate(found, axis=1)

    exact = precision == "float32"
    np.testing.assert_allclose(parts(HIDDEN), whole(HIDDEN), atol=1e-5 if exact else 2e-2)
    if exact:
        slopes = [jax.jit(jax.grad(lambda hidden, run=run: jnp.sin(3 * run(hidden)).sum()))(HIDDEN) for run in (parts, whole)]
        np.testing.assert_allclose(*slopes, atol=1e-4)


@BOTH
def test_the_future_does_not_reach_the_past(config):
    mixer, changed = built(config), HIDDEN.copy()
    changed[:, 4:] += 1.0
    before, after = CALL(mixer, HIDDEN, None, window())[0], CALL(mixer, changed, None, window())[0]
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


def test_slots_know_nothing_of_other_positions_and_the_context_does():
    changed = HIDDEN.copy()
    changed[:, 0] += 1.0
    for config, told in ((SLOTS, False), (CONTEXT, True)):
        mixer = built(config)
        difference = np.abs(CALL(mixer, HIDDEN, None, window())[0] - CALL(mixer, changed, None, window())[0])
        assert bool((difference[:, 1:] > 1e-4).any()) == told


@BOTH
def test_left_padding_leaves_no_trace(config):
    mixer, padded = built(config), HIDDEN.copy()
    padded[1, :3] = 1e3
    at = window(starts=(0, 3))
    together, _ = CALL(mixer, padded, mixer.init_state(BATCH, LENGTH), at)
    alone, _ = CALL(mixer, HIDDEN[1:, 3:], None, window(1))
    np.testing.assert_allclose(together[1, 3:], alone[0], atol=1e-5)
    assert np.isfinite(together).all()

    def after(hidden):
        return (CALL(mixer, hidden, mixer.init_state(BATCH, LENGTH), at)[0][1, 3:] ** 2).sum()

    slope = jax.jit(jax.grad(after))(jnp.asarray(padded))
    assert (slope[1, :3] == 0).all() and np.isfinite(slope).all() and (slope[1, 3:] != 0).any()


@BOTH
def test_a_branch_is_a_rewound_copy_that_reads_on(config):
    mixer, ends, branches, depth = built(config), np.array([2, 5]), 2, 3
    own = normal(depth, BATCH, len(ends), branches, DIM, seed=4)
    starts = (0, 1)
    trunk, read_all = HIDDEN, mixer.init_state(BATCH, LENGTH + depth, rewindable=True)
    _, read_all = CALL(mixer, trunk, read_all, window(starts=starts))
    state, at = mixer.fork(read_all, jnp.asarray(ends), branches, depth), _fork(ends, branches, starts)
    together = []
    for block in own:
        part, state = CALL(mixer, block.reshape(BATCH, -1, DIM), state, at)
        together.append(part.reshape(block.shape))
        at = at.after(1)
    assert isinstance(state, ForkedState) == (config is CONTEXT)
    for a, end in enumerate(ends):
        for branch in range(branches):
            copy, place = mixer.rewind(read_all, int(end)), window(offset=int(end), starts=starts)
            for step in range(depth):
                part, copy = CALL(mixer, own[step][:, a, branch][:, None], copy, place)
                np.testing.assert_allclose(together[step][:, a, branch], part[:, 0], atol=1e-5)
                place = place.after(1)


def _fork(ends, branches, starts):
    return Fork(jnp.repeat(jnp.asarray(ends), branches), jnp.zeros((), jnp.int32), jnp.asarray(starts, jnp.int32))


@BOTH
def test_costs_are_those_of_what_is_built(config):
    for cost in (config, dataclasses.replace(config, refinements=(1,), beta=2.0)):
        mixer = built(cost)
        assert cost.parameters(DIM) == sum(x.size for x in jax.tree.leaves(nnx.state(mixer)))
        counted = matmul_flops(lambda hidden, mixer=mixer: mixer(hidden, None, window())[0], HIDDEN)
        assert counted == BATCH * LENGTH * cost.flops(DIM, LENGTH)


@BOTH
def test_a_learned_temperature_learns_and_a_given_one_is_given(config):
    mixer = built(config)
    np.testing.assert_allclose(mixer.beta, (DIM // 2) ** -0.5, rtol=1e-6)
    graph, params = nnx.split(mixer)
    slope = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(jnp.asarray(HIDDEN), None, window())[0] ** 2).sum()))(
        params
    )
    assert (slope.log_beta[...] != 0).all() and (slope.gate.kernel[...] != 0).any()
    fixed = built(dataclasses.replace(config, beta=2.0))
    assert fixed.log_beta is None and (fixed.beta == 2.0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_slots": 0}, "num_slots and num_heads must be at least 1, got 0"),
        ({"num_heads": 0}, "must be at least 1"),
        ({"refinements": ()}, "one or more depths of at least 1"),
        ({"refinements": (2, 0)}, "one or more depths of at least 1, got \\(2, 0\\)"),
        ({"beta": 0.0}, "beta must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(SLOTS, **changes)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match="num_heads=3 must divide dim=8"):
        HopfieldConfig(num_heads=3).build(DIM, rngs=nnx.Rngs(0))
