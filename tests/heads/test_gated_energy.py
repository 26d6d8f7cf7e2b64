"""The gated energy head: what its gate mixes, what it starts as, and where the energy score sends it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from calm.core.dense import PRECISIONS
from calm.core.energy_score import energy_loss
from calm.core.gaussian import Gaussian
from calm.core.head import Head
from calm.errors import UsageError
from calm.heads.gated import GATE_BINS, GatedEnergyHead, GatedEnergyHeadConfig
from jaxpr_flops import matmul_flops
from random_models import Layer, normal, random_model

DIM, LATENT, SAMPLES = 8, 5, 3
HIDDEN = normal(2, 4, DIM)
KINDS = {
    "scalar": GatedEnergyHeadConfig(gate="scalar"),
    "dimension": GatedEnergyHeadConfig(gate="dimension"),
    "dynamic": GatedEnergyHeadConfig(gate="dynamic"),
    "noise": GatedEnergyHeadConfig(gate="dynamic", noise_dim=6, noise_std=1.5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def head(kind: str, precision: str = "float32") -> GatedEnergyHead:
    return random_model(Layer(lambda rngs: KINDS[kind].build(DIM, LATENT, rngs=rngs, precision=precision)))


@every_kind
def test_a_sample_is_what_the_gate_mixes_and_depends_on_its_noise_and_position_only(kind):
    model, std = head(kind), KINDS[kind].noise_std
    run = jax.jit(lambda hidden, noise: (model(hidden, noise), model.gates(hidden)))
    noise = np.array(jax.jit(lambda: model.draw_noise(jax.random.key(0), (SAMPLES, 2, 4)))())
    assert noise.shape == (SAMPLES, 2, 4, model.noise_dim)
    before, gates = map(np.asarray, run(HIDDEN, noise))
    assert before.shape == (SAMPLES, 2, 4, LATENT) and gates.shape == (2, 4, LATENT)
    # z = g delta + (1 - g) noise: noise enters by 1 - g, and what is left does not depend on it
    moved, by = noise.copy(), normal(SAMPLES, 2, 4, LATENT, seed=3)
    moved[..., :LATENT] += by
    np.testing.assert_allclose(run(HIDDEN, moved)[0] - before, (1 - gates) * std * by, atol=1e-5)
    delta = (before - (1 - gates) * std * noise[..., :LATENT]) / gates
    assert (np.ptp(delta, axis=0).max() < 1e-4) == (kind != "noise")
    hidden = HIDDEN.copy()
    hidden[0, 1] += 1.0
    moved = noise.copy()
    moved[2, 1, 3] += 1.0
    changed = np.abs(np.asarray(run(hidden, moved)[0]) - before).max(-1) > 1e-6
    expected = np.zeros((SAMPLES, 2, 4), bool)
    expected[:, 0, 1] = expected[2, 1, 3] = True
    np.testing.assert_array_equal(changed, expected)
    # what the kinds differ in
    assert (np.ptp(gates, axis=-1).max() == 0) == (kind == "scalar")
    assert (np.ptp(gates, axis=(0, 1)).max() == 0) == (kind in ("scalar", "dimension"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_alone_is_the_sample_among_others(precision):
    model = head("noise", precision)
    noise = jax.jit(lambda: model.draw_noise(jax.random.key(0), (SAMPLES, 2, 4)))()
    run = jax.jit(lambda hidden, noise: model(hidden, noise))
    alone = run(HIDDEN[1, 2:3], noise[1:2, 1, 2:3])
    np.testing.assert_allclose(alone[0, 0], run(HIDDEN, noise)[1, 1, 2], atol=1e-5 if precision == "float32" else 3e-2)


def test_noise_is_normal_and_uniform_and_a_new_gate_is_nearly_open():
    model, hidden = KINDS["noise"].build(DIM, LATENT, rngs=nnx.Rngs(0)), jnp.asarray(HIDDEN)
    noise, samples, gates = jax.jit(
        lambda key: (model.draw_noise(key, (4000, 2, 4)), model.sample(key, hidden, 4000), model.gates(hidden))
    )(jax.random.key(0))
    latent, uniform = np.asarray(model.latent_noise(noise)), np.asarray(noise[..., LATENT:])
    assert latent.shape[-1] == LATENT and uniform.shape[-1] == 6
    np.testing.assert_allclose([latent.mean(), latent.std()], [0, 1.5], atol=0.02)
    assert np.abs(uniform).max() <= 0.5 and uniform.std() == pytest.approx(12**-0.5, rel=0.02)
    np.testing.assert_allclose(gates, 1 / (1 + np.exp(-4)), rtol=1e-6)
    # delta starts at 0: what comes out is the noise, times 1 - .982
    np.testing.assert_allclose(samples, (1 - 0.98201379) * latent, atol=1e-6)


@every_kind
def test_flops_are_those_of_the_products_in_the_program(kind):
    positions, config = 6, KINDS[kind]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(DIM, LATENT, rngs=nnx.Rngs(0))))
    shapes = [jax.ShapeDtypeStruct((positions, DIM), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((SAMPLES, positions, LATENT + config.noise_dim), jnp.float32)]
    made = matmul_flops(lambda params, hidden, noise: nnx.merge(graphdef, params)(hidden, noise), params, *shapes)
    assert made == positions * config.flops(DIM, LATENT, SAMPLES)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    gate = {"scalar": 1, "dimension": LATENT}.get(config.gate, LATENT + DIM * LATENT)
    bare = GatedEnergyHeadConfig(gate="scalar", noise_dim=config.noise_dim)
    assert weights - gate == sum(map(np.size, jax.tree.leaves(nnx.state(bare.build(DIM, LATENT, rngs=nnx.Rngs(0)))))) - 1


# -- the gate finds the spread of the truth ---------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("config", "steps"))
def trained_gates(config: GatedEnergyHeadConfig, hidden, mean, std, steps: int = 200):
    """Gates and g * delta of a head trained by the energy score alone on draws of N(mean, std^2), from 4 positions on."""
    graphdef, params = nnx.split(config.build(DIM, mean.shape[-1], rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def step(carry, key):
        params, state = carry
        draw, noise = jax.random.split(key)
        truth = mean + std * jax.random.normal(draw, mean.shape)

        def loss(params):
            samples = nnx.merge(graphdef, params).sample(noise, hidden, 8)
            return energy_loss(samples, Gaussian(truth, jnp.full_like(truth, -4.0)), key).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps))
    model = nnx.merge(graphdef, params)
    return model.gates(hidden), model(hidden, jnp.zeros((1, *hidden.shape[:-1], model.noise_dim)))[0]


ROWS, WIDTH = 64, 12


@pytest.mark.parametrize(("std", "noise_std"), [(0.15, 1.0), (0.65, 1.0), (1.4, 2.0)])
def test_the_energy_score_sets_one_minus_the_gate_to_the_spread_of_the_truth(std, noise_std):
    """The plain explanation of a gate that "falls from 1.0 to about .35 by itself": the next latent has a spread of .65."""
    mean = jnp.broadcast_to(jnp.asarray(normal(WIDTH)), (ROWS, WIDTH))
    config = GatedEnergyHeadConfig(num_blocks=1, gate="scalar", noise_std=noise_std)
    gates, centre = trained_gates(config, jnp.ones((ROWS, DIM)), mean, jnp.full_like(mean, std))
    np.testing.assert_allclose((1 - gates) * noise_std, std, atol=0.02 * noise_std)
    np.testing.assert_allclose(centre, mean, atol=0.1)


def test_a_dynamic_gate_tells_what_is_known_from_what_is_not():
    """Each of two hidden states has its own spread, and half of the dimensions another."""
    which = np.arange(ROWS) % 2
    hidden = jnp.asarray(normal(2, DIM)[which])
    spread = np.where(np.arange(WIDTH) < WIDTH // 2, *(np.array([[0.1], [0.6]])[which], np.array([[0.4], [0.9]])[which]))
    config = GatedEnergyHeadConfig(num_blocks=1, gate="dynamic")
    gates, _ = trained_gates(config, hidden, jnp.zeros((ROWS, WIDTH)), jnp.asarray(spread, jnp.float32))
    found = 1 - np.asarray(gates)
    halves = [[found[state, :6].mean(), found[state, 6:].mean()] for state in (0, 1)]
    np.testing.assert_allclose(halves, [[0.1, 0.4], [0.6, 0.9]], atol=0.04)


# -- what is measured -------------------------------------------------------------------------------------------------


def test_gate_measures_are_the_mean_and_the_shares_and_other_heads_have_none():
    model = head("dynamic")
    measured = jax.jit(lambda hidden: model.measures(hidden))(jnp.asarray(HIDDEN))
    gates = np.asarray(jax.jit(model.gates)(jnp.asarray(HIDDEN)))
    counts, _ = np.histogram(gates, np.linspace(0, 1, GATE_BINS + 1))
    np.testing.assert_allclose(measured["gate_histogram"], counts / gates.size, atol=1e-6)
    np.testing.assert_allclose(measured["gate_mean"], gates.mean(), rtol=1e-6)
    assert measured["gate_histogram"].sum() == pytest.approx(1)
    assert Head().measures(jnp.asarray(HIDDEN)) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"noise_dim": -1}, "noise_dim at least 0"),
        ({"noise_std": 0.0}, "noise_std must be above 0 and finite, got 0.0"),
        ({"noise_std": float("inf")}, "noise_std must be above 0"),
        ({"gate_logit": 11.0}, "gate_logit must lie in -10 .. 10, got 11.0"),
        ({"gate_logit": float("nan")}, "gate_logit must lie in -10 .. 10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(KINDS["dynamic"], **change)
