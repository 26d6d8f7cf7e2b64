"""A change lies beside the weights: which weights it is about, how long it is, and that nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ttt_models
from calm.errors import UsageError
from calm.train.trees import named_leaves
from calm.ttt import fast_weights
from calm.ttt.fast_weights import Factors, FastWeightsConfig

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    return nnx.state(ttt_models.next_vector(writer=ttt_models.WRITER))


def random_change(config, params):
    change = config.init(params, KEY)
    leaves, structure = jax.tree.flatten(change)
    return jax.tree.unflatten(structure, [0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)])


@pytest.mark.parametrize("part", ["head", "all"])
@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_weights_that_were_chosen_change(params, part, rank):
    config = FastWeightsConfig(part=part, rank=rank)
    before = {name: np.array(leaf) for name, leaf in named_leaves(params).items()}
    after = named_leaves(fast_weights.adapted(params, random_change(config, params)))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = ("lm.head",) if part == "head" else ("lm.head", "lm.backbone", "lm.stem")
    expected = {name for name in before if name.startswith(parts) and (not rank or name.endswith("kernel"))}
    assert moved == expected and expected
    assert all(np.array_equal(before[name], leaf) for name, leaf in named_leaves(params).items())
    assert not any("context_decoder" in name or "autoencoder" in name for name in moved)


@pytest.mark.parametrize("rank", [0, 2])
def test_no_change_leaves_every_bit(params, rank):
    change = FastWeightsConfig(part="all", rank=rank).init(params, KEY)
    assert float(fast_weights.norm(change)) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(fast_weights.norm)(change)))
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(fast_weights.adapted(params, change)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_factors_have_the_rank_that_was_asked_for_and_hold_fewer_numbers(params):
    config = FastWeightsConfig(part="head", rank=2)
    change = random_change(config, params)
    for name, each in change.items():
        assert isinstance(each, Factors) and fast_weights.whole(each).shape == named_leaves(params)[name].shape
        assert np.linalg.matrix_rank(np.asarray(fast_weights.whole(each))).max() == 2
    assert config.size(params) < FastWeightsConfig(part="head").size(params)


def test_the_first_low_rank_step_is_the_full_one_on_average(params):
    """left left^T has mean I, so that one rate suits all ranks."""
    name = "lm.head.out.kernel"
    config, keys = FastWeightsConfig(rank=2), jax.random.split(KEY, 400)
    left = np.asarray(jax.jit(jax.vmap(lambda key: config.init(params, key)[name].left))(keys))
    mean = (left @ left.swapaxes(1, 2)).mean(0)
    np.testing.assert_allclose(mean, np.eye(len(mean)), atol=0.35)
    np.testing.assert_allclose(np.diag(mean).mean(), 1, atol=0.1)


@pytest.mark.parametrize("rank", [0, 2])
def test_projection_shortens_what_is_too_long_and_nothing_else(params, rank):
    change = random_change(FastWeightsConfig(rank=rank), params)
    length = float(fast_weights.norm(change))
    np.testing.assert_allclose(
        fast_weights.norm(fast_weights.projected(change, jnp.float32(length / 3))), length / 3, rtol=1e-4
    )
    for one, two in zip(
        jax.tree.leaves(fast_weights.projected(change, jnp.float32(jnp.inf))), jax.tree.leaves(change), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_random_direction_is_as_long_in_every_weight_and_points_elsewhere(params):
    change = random_change(FastWeightsConfig(rank=2), params)
    other = fast_weights.random_like(jax.random.key(7), change)
    for name, each in change.items():
        one, two = np.asarray(fast_weights.whole(each)).ravel(), np.asarray(other[name]).ravel()
        np.testing.assert_allclose(np.linalg.norm(two), np.linalg.norm(one), rtol=1e-4)
        assert abs(one @ two) < 0.5 * (one @ one)


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(UsageError, match="rank must lie in 0 .. 1024, got -1"):
        FastWeightsConfig(rank=-1)
