"""Backbones of every pattern: equal modes, nothing from the future, padding that is not there, branches, rewinding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.mixer import LayerInputs, Window
from calm.core.transformer import TransformerConfig
from calm.core.unrolled import unrolled, unstack
from calm.errors import UsageError
from calm.hybrid.backbone import HybridConfig
from calm.hybrid.gates import GatedMixer
from hybrid_models import CONFIGS, DIM, EVERY, begun, built, hidden, read, whole
from jaxpr_flops import matmul_flops

BATCH, LENGTH = 2, 7
HIDDEN = hidden(BATCH, LENGTH)
PATTERNS = pytest.mark.parametrize("name", EVERY)


@pytest.fixture(autouse=True)
def layers_are_a_loop(monkeypatch):
    """Few layers are written out on a CPU; a loop compiles in half the time."""
    monkeypatch.setattr("calm.core.stack.MAX_UNROLLED", 1)


@PATTERNS
def test_the_future_does_not_reach_the_past(name):
    model = built(CONFIGS[name])
    before, after = whole(model, HIDDEN), whole(model, HIDDEN.at[:, 4:].add(1.0))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


@PATTERNS
def test_blocks_steps_and_layers_taken_apart_equal_the_whole(name):
    model = built(CONFIGS[name])
    expected, state, parts = whole(model, HIDDEN), begun(model, BATCH, LENGTH + 2), []
    for block in jnp.split(HIDDEN, [3, 4, 5], axis=1):
        part, state = read(model, block, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)

    state = read(model, HIDDEN[:, :5], begun(model, BATCH, LENGTH, rewindable=True))[1]
    state = state._replace(layers=unstack(state.layers, CONFIGS[name].num_periods))
    apart = unrolled(model)
    for place in (5, 6):
        part, state = read(apart, HIDDEN[:, place : place + 1], state)
        np.testing.assert_allclose(part[:, 0], expected[:, place], atol=1e-5)
    state = jax.jit(lambda model, state: model.rewind(state, 6))(apart, state)
    np.testing.assert_allclose(read(apart, HIDDEN[:, 6:], state)[0][:, 0], expected[:, 6], atol=1e-5)


@pytest.mark.parametrize("name", ["by turns", pytest.param("reasoner", marks=pytest.mark.slow)])
def test_gradients_through_blocks_equal_those_of_the_whole(name):
    model = built(CONFIGS[name])
    graphdef, weights = nnx.split(model)

    def of_whole(weights, hidden):
        return (nnx.merge(graphdef, weights)(hidden)[0] ** 3).sum()

    def of_blocks(weights, hidden):
        model = nnx.merge(graphdef, weights)
        first, state = model(hidden[:, :4], model.init_state(BATCH, LENGTH))
        second, _ = model(hidden[:, 4:], state)
        return (first**3).sum() + (second**3).sum()

    found, expected = (jax.jit(jax.grad(run, argnums=(0, 1)))(weights, HIDDEN) for run in (of_blocks, of_whole))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, np.abs(other).max()))


@PATTERNS
def test_left_padding_does_not_change_a_row(name):
    model, starts = built(CONFIGS[name]), jnp.array([0, 3], jnp.int32)
    padded = HIDDEN.at[1, :3].set(1e3)  # what stands in the padding has no say
    together = read(model, padded, begun(model, BATCH, LENGTH, starts))[0]
    np.testing.assert_allclose(together[0], whole(model, HIDDEN)[0], atol=1e-5)
    np.testing.assert_allclose(together[1, 3:], whole(model, HIDDEN[1:, 3:])[0], atol=1e-5)


@PATTERNS
def test_branches_are_rewound_copies_that_read_on(name):
    model, ends, branches, depth = built(CONFIGS[name]), (2, 5, LENGTH), 2, 3
    starts = jnp.array([0, 1], jnp.int32)
    trunk = read(model, HIDDEN, begun(model, BATCH, LENGTH + depth, starts, rewindable=True))[1]
    own = hidden(depth, BATCH, len(ends) * branches, seed=1)
    state = jax.jit(lambda model, state: model.fork(state, jnp.array(ends), branches, depth))(model, trunk)
    together = []
    for block in own:
        part, state = read(model, block, state)
        together.append(part)
    rewind = jax.jit(lambda model, state, position: model.rewind(state, position))
    for number, branch in ((0, 1), (1, 2)):
        expected, alone = read(model, own[:, :, branch].swapaxes(0, 1), rewind(model, trunk, ends[number]))
        np.testing.assert_allclose(np.stack(together, axis=1)[:, :, branch], expected, atol=1e-5)
        text = jnp.concatenate([HIDDEN[:1, : ends[number]], own[:, :1, branch].swapaxes(0, 1)], axis=1)
        np.testing.assert_allclose(expected[0], whole(model, text)[0, ends[number] :], atol=1e-5)
        assert alone.window.offset == ends[number] + depth


@PATTERNS
def test_parameters_and_flops_are_those_of_the_program(name):
    wide = dict(dim=32, num_heads=2, num_kv_heads=1, inner_dim=64)
    config, length = dataclasses.replace(CONFIGS[name], **wide), 64
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graphdef, weights = nnx.split(model)
    assert config.parameters() == sum(x.size for x in jax.tree.leaves(weights))
    shape = jax.ShapeDtypeStruct((3, length, 32), jnp.float32)
    counted = matmul_flops(lambda weights, x: nnx.merge(graphdef, weights)(x)[0], weights, shape)
    assert counted == pytest.approx(3 * length * config.flops(length), rel=0.1)


def test_a_state_that_cannot_be_rewound_says_so():
    model = built(CONFIGS["by turns"])
    with pytest.raises(UsageError, match="rewindable=True"):
        model.fork(begun(model, 1, 4), jnp.array([1]), 1, 1)
    forked = model.fork(begun(model, 1, 4, rewindable=True), jnp.array([1]), 1, 1)
    for again in (lambda: model.fork(forked, jnp.array([1]), 1, 1), lambda: model.rewind(forked, 1)):
        with pytest.raises(UsageError, match="takes the state of a sequence"):
            again()


def test_the_gated_mixer_is_the_mean_of_its_paths_under_its_shares():
    mixers = {"C": CONFIGS["by turns"].mixer("C"), "A": CONFIGS["reasoner"].mixer("A")}
    mixer = nnx.jit(lambda: GatedMixer(DIM, mixers, rngs=nnx.Rngs(0), precision="float32"))()

    @jax.jit
    def run(mixer, bias):
        found, window = {}, Window(jnp.zeros((), jnp.int32), jnp.zeros((BATCH,), jnp.int32))

        def tap(name, value):
            found[name] = value
            return value

        return mixer.mix(HIDDEN, None, window, LayerInputs(tap, bias))[0], found

    mixed, found = run(mixer, None)
    shares, bias = found["gate"], hidden(BATCH, LENGTH, seed=3)[..., :2]
    np.testing.assert_allclose(shares, 0.5, atol=0.15)  # a new gate hardly prefers one
    mean = shares[..., :1] * found["path.C"] + shares[..., 1:] * found["path.A"]
    np.testing.assert_allclose(mixed, mean, atol=1e-6)
    np.testing.assert_allclose(run(mixer, bias)[1]["gate"], jax.nn.softmax(jnp.log(shares) + bias), atol=1e-5)


def test_refinements_belong_to_the_layers_that_hold_a_memory():
    """In "C,GH" the second and the fourth layer do: of (2, 1) the second has two depths, the fourth one."""
    model = built(CONFIGS["by turns"])
    memory = dataclasses.replace(CONFIGS["by turns"].mixers["H"], refinements=(2, 2))
    deeper = nnx.merge(nnx.graphdef(model), nnx.state(model))
    deeper.config = dataclasses.replace(CONFIGS["by turns"], mixers={"H": memory})
    read_paths = jax.jit(lambda model: model.readings(HIDDEN, ("path.H",))["path.H"])
    before, after = read_paths(model), read_paths(deeper)
    assert list(before) == [1, 3]
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[3] - after[3]).max() > 1e-3


def test_the_transformer_keeps_the_names_of_its_weights():
    """Checkpoints and published models are read by them."""
    weights = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: TransformerConfig(dim=8).build(rngs=nnx.Rngs(0)))))
    layer = "attention.out.kernel attention.qkv.kernel mlp.down.kernel mlp.gate_up.kernel norm_attention.scale norm_mlp.scale"
    expected = {*(f"blocks.layer.{name}" for name in layer.split()), "norm.scale"}
    assert {".".join(map(str, path)) for path, _ in weights} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "SX"}, "unknown letter 'X'; there are A, S, C, H, G"),
        ({"pattern": "SHS"}, "a letter twice in group 'SHS'"),
        ({"pattern": "C,,H"}, "a group without letters"),
        ({"pattern": ""}, "a group without letters"),
        ({"pattern": "C,H", "num_layers": 3}, "num_layers=3 must be a multiple of the 2 groups of pattern 'C,H'"),
        ({"pattern": "C,H", "num_segments": 2}, "num_segments=2 steers gates, and pattern 'C,H' has none"),
        ({"num_segments": 0}, "num_segments must be at least 1, got 0"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        HybridConfig(**{"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "dim": DIM, **options})


def test_an_unknown_gradient_is_refused():
    config = HybridConfig()
    object.__setattr__(config, "reasoner_gradient", "half")  # past the type checks of the test run
    with pytest.raises(UsageError, match="reasoner_gradient must be one_step or full, got 'half'"):
        config.__post_init__()
