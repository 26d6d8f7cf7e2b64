"""Label smoothing, z-loss and rectified flow against their definitions, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.cross_entropy import fused_cross_entropy, plain_cross_entropy
from calm.core.dense import PRECISIONS, operand
from calm.heads.rectified_flow import on_the_line, rectified_flow_loss, white_velocity
from calm.token.hidden_flow import HiddenFlow
from calm.token.label_smoothing import smoothing_term
from calm.token.z_loss import fused_z_cross_entropy, plain_z_loss
from jaxpr_flops import matmul_flops
from random_models import normal

ROWS, DIM, VOCAB = 700, 8, 51  # more than a block of rows, and not a multiple of one
HIDDEN, TABLE = jnp.asarray(2 * normal(ROWS, DIM)), jnp.asarray(normal(VOCAB, DIM, seed=1))
GENERATOR = np.random.default_rng(2)
TARGETS = jnp.asarray(GENERATOR.integers(0, VOCAB, ROWS), jnp.int32)
WEIGHTS = jnp.asarray(GENERATOR.random(ROWS), jnp.float32)


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(jnp.abs(jnp.asarray(b)).max()), 1e-3))


@pytest.mark.parametrize("e", [0.1, 0.9])
def test_smoothing_is_the_cross_entropy_against_the_smoothed_target(e):
    def direct(hidden, table):
        target = (1 - e) * jax.nn.one_hot(TARGETS, VOCAB) + e / VOCAB
        return -(WEIGHTS * (target * jax.nn.log_softmax(hidden @ table.T)).sum(-1)).sum()

    def ours(hidden, table):
        extra = (smoothing_term(hidden, table, TARGETS) * WEIGHTS).sum()
        return fused_cross_entropy(hidden, table, TARGETS, WEIGHTS) + e * extra

    close(*(jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(HIDDEN, TABLE) for f in (ours, direct)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_z_loss_is_the_square_of_the_log_normaliser(precision):
    weight = 0.05

    def direct(hidden, table):
        hidden, table = (operand(x, precision).astype(jnp.float32) for x in (hidden, table))
        log_z = jnp.log(jnp.exp(hidden @ table.T).sum(-1))
        nats, squares = (WEIGHTS * plain_cross_entropy(hidden, table, TARGETS)).sum(), (WEIGHTS * log_z**2).sum()
        return 2 * (nats + weight * squares), (nats, squares)

    def ours(hidden, table):
        loss, nats, squares = fused_z_cross_entropy(hidden, table, TARGETS, WEIGHTS, weight, precision)
        return 2 * loss, (nats, squares)

    ((value, parts), gradients), ((expected, theirs), references) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(HIDDEN, TABLE) for f in (ours, direct)
    )
    close((value, parts), (expected, theirs))
    close(gradients, references, 1e-5 if precision == "float32" else 5e-3)
    if precision == "float32":
        close(jax.jit(plain_z_loss)(HIDDEN, TABLE), jnp.log(jnp.exp(HIDDEN @ TABLE.T).sum(-1)) ** 2)


def test_without_weight_the_z_loss_changes_nothing_and_alone_it_pulls_the_normaliser_to_one():
    def both(hidden, table):
        return fused_z_cross_entropy(hidden, table, TARGETS, WEIGHTS, 0.0)[0]

    def plain(hidden, table):
        return fused_cross_entropy(hidden, table, TARGETS, WEIGHTS)

    for ours, theirs in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f, (0, 1)))(HIDDEN, TABLE)) for f in (both, plain)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    bias = jnp.full((1,), 5.0)  # a logit offset, which the cross-entropy cannot see
    shifted = jnp.concatenate([HIDDEN, jnp.ones((ROWS, 1))], 1)

    def offset(bias, weight):
        table = jnp.concatenate([TABLE, jnp.broadcast_to(bias, (VOCAB, 1))], 1)
        return fused_z_cross_entropy(shifted, table, TARGETS, WEIGHTS, weight)[0]

    assert abs(float(jax.grad(offset)(bias, 0.0)[0])) < 1e-3
    assert float(jax.grad(offset)(bias, 1e-3)[0]) > 0.1


def test_the_line_and_its_velocity():
    start, end = jnp.asarray(normal(3, 4)), jnp.asarray(normal(3, 4, seed=1))
    np.testing.assert_allclose(on_the_line(start, end, jnp.zeros(3)), start)
    np.testing.assert_allclose(on_the_line(start, end, jnp.ones(3)), end, atol=1e-6)
    np.testing.assert_allclose(rectified_flow_loss(end - start, start, end), 0)
    np.testing.assert_allclose(rectified_flow_loss(end - start + 2, start, end), 4, rtol=1e-5)


@pytest.mark.parametrize("std", [0.25, 1.0])
def test_the_least_flow_loss_to_a_gaussian_is_its_standard_deviation_times_half_pi(std):
    """So a gradient that reaches the target makes it predictable, and a constant target has no loss."""
    keys, count, mean = jax.random.split(jax.random.key(0), 3), 100_000, 0.7
    time = (jnp.arange(count) + jax.random.uniform(keys[0], (count,))) / count
    start = jax.random.normal(keys[1], (count, 1))

    def least(std):
        end = mean + std * jax.random.normal(keys[2], (count, 1))
        x, t = on_the_line(start, end, time), time[:, None]
        gain = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2)  # regression of x_1 - x_0 on x_t
        return rectified_flow_loss(mean + gain * (x - t * mean), start, end).mean()

    value, slope = jax.jit(jax.value_and_grad(least))(std)
    np.testing.assert_allclose(value, std * np.pi / 2, rtol=2e-2)
    np.testing.assert_allclose(slope, np.pi / 2, rtol=4e-2)
    if std == 1.0:
        end = jax.random.normal(keys[2], (count, 1))
        white = rectified_flow_loss(white_velocity(on_the_line(start, end, time), time), start, end)
        np.testing.assert_allclose(white.mean(), np.pi / 2, rtol=1e-2)


STATES = jnp.asarray(normal(2, 9, 16))


def flow_of(seed=0, trained=True):
    flow = HiddenFlow(16, rngs=nnx.Rngs(seed))
    if trained:  # a new network is zero everywhere, and so deaf to its condition
        graph, params = nnx.split(flow)
        flow = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=3), params))
    return flow


@pytest.mark.parametrize(("gradient", "moves_target"), [("condition", False), ("both", True)])
def test_which_states_the_flow_trains(gradient, moves_target):
    flow = flow_of()
    slope = jax.jit(jax.grad(lambda x: flow.loss(jax.random.key(0), x, gradient=gradient)[:, -1].sum()))(STATES)
    assert jnp.abs(slope[:, -2]).max() > 1e-4  # the state that v is told
    assert (jnp.abs(slope[:, -1]).max() > 1e-4) == moves_target  # the state that it aims at
    assert jnp.abs(slope[:, :-2]).max() == 0


def test_the_flow_begins_at_half_pi_and_does_not_see_the_size_of_its_target():
    flow, key = flow_of(trained=False), jax.random.key(1)
    long = jnp.asarray(normal(4, 500, 16, seed=5))
    loss = jax.jit(lambda x: flow.loss(key, x, gradient="both"))
    np.testing.assert_allclose(loss(long).mean(), np.pi / 2, rtol=0.05)
    np.testing.assert_allclose(loss(long), loss(7 * long), rtol=1e-3, atol=1e-5)


def test_its_flops_are_those_of_its_products():
    flow = flow_of()
    counted = matmul_flops(lambda x: flow.loss(jax.random.key(0), x, gradient="both"), STATES)
    np.testing.assert_allclose(counted, HiddenFlow.flops(16) * 2 * 8, rtol=0.01)
