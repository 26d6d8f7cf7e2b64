"""Laws of one update, and of the optimiser in it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.errors import UsageError
from calm.train.mesh import MeshConfig
from calm.train.optim import OptimizerConfig
from calm.train.steps import StepConfig, TrainStep
from toy_training import ToyBatches, ToyObjective

FAST = OptimizerConfig(learning_rate=0.01, warmup_steps=0)


def make(objective=None, **changes) -> TrainStep:
    values = {"total_steps": 20, "batch_size": 8, "num_tokens": 12, "optimizer": FAST} | changes
    return TrainStep(objective or ToyObjective(), StepConfig(**values), MeshConfig().build())


def advance(step, updates):
    leaves, batches = step.init(jax.random.key(0)), ToyBatches()
    states = []
    for _ in range(updates):
        leaves = step(leaves, next(batches))
        states.append(jax.device_get(step.state(leaves)))
    return states


def test_microbatches_equal_the_whole_batch():
    whole, parts = advance(make(), 3)[-1], advance(make(accumulation=4), 3)[-1]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_step_is_adamw_on_the_clipped_gradient_of_its_named_stream():
    from calm.rng import stream

    objective, tokens = ToyObjective(noise=0.5), next(ToyBatches())
    step = make(objective, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, clip_norm=0.1))
    leaves = step.init(jax.random.key(3))
    params = jax.tree.map(jnp.copy, step.state(leaves).params)
    key = stream(jax.random.key(3), "train", 0)
    grads, _ = jax.jit(jax.grad(objective.loss, has_aux=True))(params, objective.frozen, jnp.asarray(tokens), key, jnp.int32(0))
    norm = optax.tree.norm(grads)
    after = jax.device_get(step.state(step(leaves, tokens)))
    np.testing.assert_allclose(after.sums["grad_norm"], norm, rtol=1e-5)

    def expected(value, grad, decay):
        grad = grad * 0.1 / norm  # norm is above 0.1; after one step Adam's corrected moments are g and g^2
        return value - 0.01 * (grad / (jnp.abs(grad) + 1e-8) + decay * value)

    np.testing.assert_allclose(
        after.params["layers"]["kernel"], expected(params["layers"]["kernel"], grads["layers"]["kernel"], 0.1), rtol=1e-4
    )
    np.testing.assert_allclose(
        after.params["layers"]["bias"], expected(params["layers"]["bias"], grads["layers"]["bias"], 0.0), rtol=1e-4
    )


def test_records_are_means_over_the_steps_since_the_last():
    each = [state.sums["loss"] for state in advance(make(log_every=1), 7)]
    grouped = advance(make(log_every=3), 7)
    assert [int(state.count) for state in grouped] == [1, 1, 2, 3, 1, 2, 3]  # recorded after steps 0, 3, 6
    np.testing.assert_allclose(grouped[3].sums["loss"], sum(each[1:4]), rtol=1e-6)
    np.testing.assert_allclose(grouped[6].sums["loss"], sum(each[4:7]), rtol=1e-6)


def test_the_moving_average_follows_its_recursion():
    states = advance(make(ema_decay=0.5), 6)
    kernel = [state.params["layers"]["kernel"] for state in states]
    average = [state.average["layers"]["kernel"] for state in states]
    for n in range(1, 6):
        decay = min(0.5, (1 + n) / (10 + n))
        np.testing.assert_allclose(average[n], decay * average[n - 1] + (1 - decay) * kernel[n], rtol=1e-5, atol=1e-7)
    assert states[0].best_params is states[0].average


def test_the_moving_average_forgets_where_it_began():
    """Under the rising decay (1 + n) / (10 + n) the states after n updates weigh what the recursion unrolled says, and what the
    run began with one in C(n + 9, 9): no correction for its start is needed."""
    step = make(ema_decay=0.999)
    begun = jax.device_get(step.state(step.init(jax.random.key(0)))).params["layers"]["kernel"]
    states = advance(step, 6)
    decays = [(1 + n) / (10 + n) for n in range(6)]
    later = [math.prod(decays[n + 1 :]) for n in range(6)]
    average = begun / math.comb(15, 9)
    for state, decay, factor in zip(states, decays, later, strict=True):
        average = average + (1 - decay) * factor * state.params["layers"]["kernel"]
    np.testing.assert_allclose(states[-1].average["layers"]["kernel"], average, rtol=1e-5, atol=1e-7)


def test_without_a_decay_there_is_no_average_and_the_parameters_are_as_with_one():
    bare, averaged = advance(make(), 3)[-1], advance(make(ema_decay=0.9), 3)[-1]
    assert not jax.tree.leaves(bare.average) and bare.best_params is bare.params
    for ours, theirs in zip(jax.tree.leaves(bare.params), jax.tree.leaves(averaged.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_first_bad_step_is_remembered():
    assert [int(state.bad_step) for state in advance(make(ToyObjective(bad_step=2)), 5)] == [-1, -1, 2, 2, 2]


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match="batch_size=8 must be a multiple of accumulation=3"):
        make(accumulation=3)


def test_learning_rate_warms_up_then_stays_or_falls():
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4).build_schedule(20)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 3, 4, 19)], [0.25, 0.5, 1, 1, 1])
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", final_fraction=0.1).build_schedule(20)
    np.testing.assert_allclose([cosine(step) for step in (0, 4, 12, 20)], [0.25, 1, 0.55, 0.1], rtol=1e-6)


def test_decay_spares_biases_gains_and_recurrences_however_they_are_stacked():
    shapes = {
        "blocks": {
            "layer": {"norm": {"scale": (3, 8)}, "up": {"kernel": (3, 8, 8), "bias": (3, 8)}, "ssm": {"log_decay": (3, 8)}}
        },
        "embed": {"embedding": (16, 8)},
        "gate": (8,),
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    decayed = OptimizerConfig().decayed(params)
    assert decayed["blocks"]["layer"] == {
        "norm": {"scale": False},
        "up": {"kernel": True, "bias": False},
        "ssm": {"log_decay": False},
    }
    assert decayed["embed"]["embedding"] and not decayed["gate"]


@pytest.mark.parametrize("values", [{"learning_rate": 0.0}, {"betas": (0.9, 1.0)}, {"final_fraction": 2.0}, {"no_decay": "("}])
def test_nonsense_optimisers_cannot_be_configured(values):
    with pytest.raises(UsageError, match=f"optimizer: {next(iter(values))}"):
        OptimizerConfig(**values)


def test_factors_scale_the_step_of_the_parameters_they_name():
    params = {"lm": {"backbone": {"kernel": jnp.ones((2, 2))}, "table": jnp.ones((2, 2))}}
    gradients = jax.tree.map(lambda x: 0.5 * x, params)
    plain, slow = (
        OptimizerConfig(warmup_steps=0, factors=factors).build(10) for factors in ({}, {r"^lm\.backbone\.": 0.25, "table": 1.0})
    )
    (whole, _), (scaled, _) = (optimizer.update(gradients, optimizer.init(params), params) for optimizer in (plain, slow))
    np.testing.assert_allclose(scaled["lm"]["backbone"]["kernel"], 0.25 * whole["lm"]["backbone"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["lm"]["table"], whole["lm"]["table"])
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(OptimizerConfig(warmup_steps=0).build(10).init(params))


@pytest.mark.parametrize(("factors", "words"), [({"(": 1.0}, "factors is not a regular"), ({"x": -1.0}, "cannot be negative")])
def test_bad_factors_are_refused(factors, words):
    with pytest.raises(UsageError, match=words):
        OptimizerConfig(factors=factors)
