"""Rewiring: the reward of unseen futures rises, prompts adapt alone, brakes hold, and the model itself stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.generate import laid_out
from calm.errors import DivergedError, UsageError
from calm.rng import row_keys
from calm.train.trees import named_leaves
from calm.ttt import seal as module
from calm.ttt.brakes import Brakes, drift
from calm.ttt.critic import DirectionCritic
from calm.ttt.fast_weights import FastWeightsConfig
from calm.ttt.seal import Prompts, Seal, SealConfig
from ttt_models import PROMPTS, SPECIAL, K, Z, concept, next_vector

CONFIG = SealConfig(samples=4, chunks=2, inner_steps=3, rate=0.5, brakes=Brakes(max_drift=1.0))
KEYS = row_keys(jax.random.key(0), len(PROMPTS))


@pytest.fixture(scope="module")
def predictor():
    return next_vector()


@pytest.fixture(scope="module")
def adaptation(predictor):
    seal = Seal(predictor, SPECIAL, CONFIG)
    return seal.adapt(concept(), seal.read(PROMPTS), KEYS)


def again(predictor, critic=None, prompts=None, keys=KEYS, **changes):
    """Another rewiring by the same compiled program."""
    seal = Seal(predictor, SPECIAL, dataclasses.replace(CONFIG, **changes))
    return seal.adapt(critic or concept(), prompts or seal.read(PROMPTS), keys)


def test_the_reward_of_futures_that_no_step_has_seen_rises_for_every_prompt(adaptation):
    assert (adaptation.after > adaptation.before + 0.2).all() and (adaptation.steps == 3).all()
    assert (adaptation.rewards[:, -1] > adaptation.rewards[:, 0]).all()
    assert (adaptation.norm > 0).all() and (adaptation.drift > 0.01).all()


def test_the_model_keeps_every_bit_and_writes_what_it_wrote(predictor):
    seal = Seal(predictor, SPECIAL, CONFIG)
    prompts = seal.read(PROMPTS)
    before = {name: np.array(leaf) for name, leaf in named_leaves(nnx.state(predictor)).items()}
    first = seal.write(concept(), prompts, KEYS, num_chunks=3)
    adaptation = seal.adapt(concept(), prompts, KEYS)
    other = seal.write(concept(), prompts, KEYS, adaptation.changes, num_chunks=3)
    after = named_leaves(nnx.state(predictor))
    assert all(np.array_equal(before[name], after[name]) for name in before) and len(before) == len(after)
    for one, two in zip(first, seal.write(concept(), prompts, KEYS, num_chunks=3), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (other.rewards > first.rewards).all()

    row = named_leaves(nnx.state(seal.adapted(adaptation, 1)))
    for name, leaf in row.items():
        change = adaptation.changes[name][1] if name in adaptation.changes else 0
        np.testing.assert_allclose(leaf, before[name] + change, atol=1e-6)
    assert any(not np.array_equal(row[name], before[name]) for name in before)


def test_prompts_adapt_each_for_itself(predictor, adaptation):
    chunks, starts = laid_out(PROMPTS, K, SPECIAL.begin_id)
    back = again(predictor, prompts=Prompts(chunks[::-1], starts[::-1]), keys=KEYS[::-1])
    np.testing.assert_allclose(back.rewards[::-1], adaptation.rewards, atol=1e-5)
    for name, change in adaptation.changes.items():
        np.testing.assert_allclose(back.changes[name][::-1], change, atol=1e-5)
        assert not np.allclose(change[0], change[1], atol=1e-4) or name.endswith("bias")


def test_another_concept_rate_and_limit_compile_nothing_new(predictor, adaptation):
    programs = module._adapt._cache_size()
    other = again(predictor, concept(1), rate=0.1, brakes=Brakes(max_drift=0.9, max_norm=5.0, enough=2.0))
    assert module._adapt._cache_size() == programs
    assert not np.allclose(other.rewards, adaptation.rewards)


def test_brakes_hold(predictor, adaptation):
    idle = again(predictor, brakes=Brakes(max_drift=1.0, enough=-2.0))
    assert (idle.steps == 0).all() and not any(change.any() for change in idle.changes.values())
    np.testing.assert_array_equal(idle.after, idle.before)
    np.testing.assert_allclose(idle.drift, 0, atol=1e-6)

    near = again(predictor, brakes=Brakes(max_drift=0.1))
    assert (near.drift <= 0.1).all() and (near.steps < 3).all() and (adaptation.drift > 0.1).all()

    short = again(predictor, brakes=Brakes(max_drift=1.0, max_norm=0.02))
    np.testing.assert_allclose(short.norm, 0.02, rtol=1e-3)
    assert (short.after > short.before).all() and (adaptation.norm > 0.02).all()


def test_what_stops_being_finite_ends_in_one_line_and_leaves_the_model(predictor, adaptation):
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(predictor))]
    with pytest.raises(DivergedError, match="not finite at inner step 0 of prompt 0; use a rate below 0.5"):
        again(predictor, DirectionCritic(jnp.zeros(Z), jnp.full(Z, jnp.nan)))
    with pytest.raises(DivergedError, match="not finite"):
        again(predictor, DirectionCritic(jnp.zeros(Z), jnp.full(Z, 1e30)))
    for one, two in zip(before, jax.tree.leaves(nnx.state(predictor)), strict=True):
        np.testing.assert_array_equal(one, two)
    flat = again(predictor, DirectionCritic(jnp.zeros(Z), jnp.zeros(Z)))  # nothing to climb: no step, and no error
    assert not any(change.any() for change in flat.changes.values())


def test_a_relative_step_is_as_long_as_its_rate_says_whatever_the_critic(predictor):
    """One step of rate r, by critics that differ a thousandfold in steepness."""
    for scale in (1.0, 1e3):
        steep = DirectionCritic(jnp.zeros(Z), scale * concept().direction)
        once = again(predictor, steep, rate=0.03, brakes=Brakes(max_drift=1.0, enough=None))
        first = again(predictor, steep, rate=0.03, brakes=Brakes(max_drift=1.0, max_norm=0.03))
        np.testing.assert_allclose(first.norm, 0.03, rtol=1e-3)
        assert (once.norm > 0.03).all() and (once.norm <= 0.0901).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(fast=FastWeightsConfig(part="all", rank=2)),
        dict(fast=FastWeightsConfig(part="all"), optimizer="adam", rate=0.02),
        dict(fast=FastWeightsConfig(rank=2), rate=0.2),
        dict(feedback="straight_through"),
    ],
)
def test_every_kind_of_fast_weights_raises_the_reward(predictor, changes):
    found = again(predictor, **changes)
    assert (found.after > found.before).all() and (found.steps > 0).all()


@pytest.mark.slow
def test_a_gradient_through_the_whole_trajectory_finds_another_way_than_that_of_each_step():
    """With a stem that reads latents alone both raise the reward; the two gradients are not the same."""
    predictor = next_vector("continuous")
    step, whole = (again(predictor, feedback=feedback) for feedback in ("constant", "latent"))
    assert (step.after > step.before).all() and (whole.after > whole.before).all()
    assert not np.allclose(step.rewards[:, 1:], whole.rewards[:, 1:], atol=1e-4)


@pytest.mark.slow
def test_a_penalty_on_drift_keeps_the_model_nearer(predictor, adaptation):
    held = again(predictor, brakes=Brakes(max_drift=1.0, penalty=1.0))
    assert (held.drift < adaptation.drift).all()


@pytest.mark.slow
def test_bfloat16_products_adapt_too():
    found = again(next_vector(precision="bfloat16"))
    assert (found.after > found.before).all()


def test_drift_is_nothing_between_equal_models_and_grows_with_the_distance():
    base = jax.random.normal(jax.random.key(0), (64, 4))
    np.testing.assert_allclose(drift(base, base), 0, atol=1e-6)
    moved = [float(drift(base + shift, base)) for shift in (0.2, 1.0, 30.0)]
    assert 0 < moved[0] < moved[1] < moved[2] <= 1 and moved[2] > 0.9
    assert np.isfinite(jax.grad(lambda shift: drift(base + shift, base))(0.0))
    one, two = jax.random.normal(jax.random.key(1), (2, 1000, 4, 4))  # small samples of one law: 0 on average
    np.testing.assert_allclose(jax.vmap(drift)(one, two).mean(), 0, atol=0.03)


def test_the_energy_of_text_under_the_base_model_is_a_number_for_each_text(predictor):
    seal = Seal(predictor, SPECIAL, CONFIG)
    prompts = seal.read(PROMPTS)
    written = seal.write(concept(), prompts, KEYS, num_chunks=3)
    energies = seal.energy(prompts, written.chunks, KEYS)
    assert energies.shape == (3, 1) and np.isfinite(energies).all()
    other = seal.energy(prompts, np.roll(written.chunks, 1, axis=0), KEYS)
    assert not np.allclose(energies, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samples=1), "samples must lie in 2 .. 4096"),
        (dict(inner_steps=0), "inner_steps must lie in 1 .. 1000, got 0"),
        (dict(rate=0.0), "rate must lie in \\(0, 1000\\], got 0.0"),
        (dict(rate=float("nan")), "rate must lie in"),
        (dict(at_once=0), "at_once"),
        (dict(texts=0), "texts must lie in 1 .. 4096"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SealConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(penalty=-1.0), "penalty"),
        (dict(max_drift=0.0), "max_drift must lie in \\(0, 1\\]"),
        (dict(max_norm=-1.0), "max_norm"),
        (dict(max_loss=float("inf")), "max_loss"),
        (dict(enough=float("nan")), "enough"),
    ],
)
def test_brakes_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Brakes(**options)


def test_one_key_a_prompt(predictor):
    with pytest.raises(UsageError, match="2 keys for 3 prompts"):
        again(predictor, keys=KEYS[:2])
