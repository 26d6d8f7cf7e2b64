"""The direction term: its definition, its safety, what it leaves free, and what a large weight of it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm.core.autoencoder import AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.energy_score import energy_loss, energy_parts
from calm.core.gaussian import Gaussian
from calm.core.head import HeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentObjective
from calm.core.transformer import TransformerConfig
from calm.errors import UsageError
from calm.heads.direction import direction_loss
from calm.heads.gated import GatedEnergyHeadConfig
from calm.rng import stream
from loss_terms import loss as loss_of
from random_models import normal, random_model

S, R, Z = 4, 6, 5
SAMPLES, TARGET, ORIGIN = (jnp.asarray(normal(*shape, seed=i)) for i, shape in enumerate(((S, R, Z), (R, Z), (R, Z))))


def test_it_is_one_minus_the_cosine_of_the_two_displacements_averaged_over_samples():
    def by_hand(samples, target, origin):
        found = np.zeros(R)
        for s in range(S):
            for r in range(R):
                o = origin[s, r] if origin.ndim == 3 else origin[r]
                x, y = samples[s, r] - o, target[r] - o
                found[r] += (1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)) / S
        return found

    for origin in (ORIGIN, jnp.asarray(normal(S, R, Z, seed=3))):
        ours = direction_loss(SAMPLES, TARGET, origin)
        np.testing.assert_allclose(ours, by_hand(*map(np.asarray, (SAMPLES, TARGET, origin))), atol=1e-5)
    np.testing.assert_allclose(direction_loss(jnp.stack([TARGET, 2 * ORIGIN - TARGET]), TARGET, ORIGIN), 1, atol=1e-5)


@pytest.mark.parametrize("still", ["sample", "target", "both"])
def test_value_and_gradient_are_finite_where_nothing_moves(still):
    samples = jnp.broadcast_to(ORIGIN, SAMPLES.shape) if still != "target" else SAMPLES
    target = TARGET if still == "sample" else ORIGIN
    value, gradients = jax.value_and_grad(lambda *x: direction_loss(*x).sum(), argnums=(0, 1, 2))(samples, target, ORIGIN)
    np.testing.assert_allclose(value, R)  # no angle: as if at a right one
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.abs(gradient).max() <= 100 * R


def test_it_leaves_the_length_free():
    value, gradient = jax.value_and_grad(lambda x: direction_loss(x, TARGET, ORIGIN).sum())(SAMPLES)
    for factor in (0.1, 3.0, 100.0):
        scaled = ORIGIN + factor * (SAMPLES - ORIGIN)
        np.testing.assert_allclose(direction_loss(scaled, TARGET, ORIGIN).sum(), value, rtol=1e-4)
    along = (gradient * (SAMPLES - ORIGIN)).sum(-1)
    assert np.abs(along).max() < 1e-6 < np.abs(gradient).max()


@pytest.mark.parametrize("gate", [0.1, 0.5, 0.98])
def test_from_the_noise_a_scalar_gate_cancels_and_from_the_previous_latent_it_does_not(gate):
    delta, noise = TARGET + 0.5, SAMPLES

    def loss(gate, origin):
        return direction_loss(gate * delta + (1 - gate) * noise, TARGET, origin).sum()

    value, slope = jax.value_and_grad(loss)(gate, noise)
    np.testing.assert_allclose([value, slope], [loss(1.0, noise), 0], atol=1e-4)
    assert abs(jax.grad(loss)(gate, ORIGIN)) > 1e-2

    def by_dimension(gates):
        return direction_loss(gates * delta + (1 - gates) * noise, TARGET, noise).sum()

    # a gate of each dimension's own turns the displacement
    assert np.abs(jax.grad(by_dimension)(jnp.linspace(0.2, 0.9, Z))).max() > 1e-2


# -- beside the energy, and without it --------------------------------------------------------------------------------


SPREAD, ROWS, WIDTH, STEPS = 0.65, 64, 12, 200


@jax.jit
@jax.vmap
def trained_law(energy_weight, direction_weight, start):
    """(length a, spread b) of a model o + a (m - o) + b noise of latents N(m, SPREAD^2) behind a latent o, trained by the two
    terms from a = `start`, b = SPREAD on. The truth is a = 1 and b = SPREAD.
    """
    mean, origin = jnp.ones((ROWS, WIDTH)), jnp.asarray(normal(ROWS, WIDTH, seed=5))

    def step(carry, key):
        params, state = carry
        draw, noise = jax.random.split(key)
        truth = mean + SPREAD * jax.random.normal(draw, mean.shape)

        def loss(params):
            length, log_spread = params
            samples = origin + length * (mean - origin) + jnp.exp(log_spread) * jax.random.normal(noise, (8, ROWS, WIDTH))
            energy = energy_loss(samples, Gaussian(truth, jnp.full_like(truth, -4.0)), key)
            return (energy_weight * energy + direction_weight * direction_loss(samples, truth, origin)).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
    params = (start, jnp.log(jnp.float32(SPREAD)))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), STEPS))
    return params[0], jnp.exp(params[1])


def laws(energy_weight: float, direction_weights: list[float], starts: list[float]) -> tuple[np.ndarray, np.ndarray]:
    weights, starts = jnp.asarray(direction_weights), jnp.asarray(starts)
    length, spread = map(np.asarray, trained_law(jnp.full_like(starts, energy_weight), weights, starts))
    print(f"{energy_weight=} {direction_weights=} {length=} {spread=}")
    return length, spread


def test_a_large_weight_narrows_the_spread_that_the_energy_alone_would_keep():
    """docs/calm-on-z.md has these numbers."""
    length, spread = laws(1.0, [0.0, 0.1, 2.0, 10.0], [1.0] * 4)
    np.testing.assert_allclose(length, 1, atol=0.1)
    assert spread[0] == pytest.approx(SPREAD, abs=0.02)
    assert spread[0] - spread[1] < 0.02
    assert spread[2] < 0.9 * SPREAD and spread[3] < 0.65 * SPREAD


def test_alone_it_has_no_length_and_wants_no_spread():
    starts = [0.4, 1.0, 3.0, 3.0]
    length, spread = laws(0.0, [1.0] * 4, starts)
    assert (length > np.asarray(starts)).all() and np.ptp(length) > 1  # each stays where it began, or goes on growing
    assert (spread / length < 0.3 * SPREAD).all()
    length, _ = laws(1.0, [0.1] * 4, starts)
    np.testing.assert_allclose(length, 1, atol=0.1)  # the energy knows where latents lie, wherever it begins


# -- as a term of the objective ---------------------------------------------------------------------------------------

V, K = 24, 2
CODEC = AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=Z, dim=8, inner_dim=12)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, V, (3, 12)), jnp.int32)
GATED = GatedEnergyHeadConfig(num_blocks=1, gate="scalar", gate_logit=0.0)


def objective(head: HeadConfig = GATED, **terms: object) -> LatentObjective:
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=24)
    lm = LatentLMConfig(vocab_size=V, chunk_size=K, latent_dim=Z, backbone=backbone, head=head, stem="continuous")
    return LatentObjective(lm, loss_of(head=head.kind, num_samples=4, **terms), random_model(CODEC), context=6)


def fresh(subject: LatentObjective):
    params = subject.init(jax.random.key(0))
    head = params["lm"]["head"]["out"]["kernel"]
    head[...] = jax.random.normal(jax.random.key(8), head[...].shape)  # a new head's delta is 0
    return params


KEY = jax.random.key(1)


def test_the_three_kinds_of_loss_are_weights_of_one_objective():
    """calm = energy, rf = direction, calm_rf = energy + lambda direction; whichever is on, both are measured."""
    both, calm, rf = objective(direction_weight=0.5), objective(), objective(energy_weight=0.0, direction_weight=1.0)
    bare = objective(EnergyHeadConfig(num_blocks=1, noise_dim=3))
    codec = random_model(CODEC)

    @jax.jit
    def run(params):
        chunks = TOKENS.reshape(3, 6, K)
        posterior, lm = codec.encode(chunks), both.module(params)
        hidden, _ = lm.hidden(chunks[:, :-1], autoencoder=codec)
        samples = lm.sample(stream(KEY, "head"), hidden, 4)
        target = jax.tree.map(lambda x: x[:, 1:], posterior)
        parts = energy_parts(samples, target, stream(KEY, "targets"))
        # displacements begin at the posterior mean of the chunk before
        direction = direction_loss(samples, target.mean, posterior.mean[:, :-1]).mean()
        return [subject.loss(params, subject.frozen, TOKENS, KEY) for subject in (both, calm, rf)], parts, direction

    results, (fidelity, diversity), direction = run(fresh(both))
    energy = 2 * fidelity.mean() - diversity.mean()
    for (value, terms), expected in zip(results, (energy + 0.5 * direction, energy, direction), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose([terms["fidelity"], terms["diversity"]], [fidelity.mean(), diversity.mean()], rtol=1e-4)
        np.testing.assert_allclose(terms["fidelity_at"], fidelity.mean(0), rtol=1e-4)
        assert terms["fidelity_at"].shape == (5,)
        np.testing.assert_allclose(terms["direction"], direction, rtol=1e-4)
    measured = jax.eval_shape(lambda: bare.loss(bare.init(KEY), bare.frozen, TOKENS, KEY)[1])
    assert set(measured) == {"energy", "fidelity", "diversity", "fidelity_at"}  # without gate or weight there is no direction


@pytest.mark.parametrize(("source", "moves"), [("previous", True), ("noise", False)])
def test_it_trains_stem_backbone_and_head_and_from_the_noise_no_scalar_gate(source, moves):
    subject = objective(energy_weight=0.0, direction_weight=1.0, direction_from=source)
    gradients = jax.jit(jax.grad(lambda params: subject.loss(params, subject.frozen, TOKENS, KEY)[0]))(fresh(subject))["lm"]
    for part in ("stem", "backbone", "head"):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients[part])) > 1e-4, part
    assert (np.abs(gradients["head"]["gate"]["bias"][...]).max() > 1e-4) == moves


def test_alone_it_draws_and_encodes_what_the_energy_does():
    off, on = objective(), objective(energy_weight=0.0, direction_weight=1.0)
    assert off.samples_needed == on.samples_needed == 4 and off.flops_per_token() == on.flops_per_token()


@pytest.mark.parametrize(
    ("head", "terms", "words"),
    [
        (EnergyHeadConfig(), dict(direction_weight=1.0, direction_from="noise"), 'needs a head of kind "gated"'),
        (GATED, dict(direction_weight=-1.0), "direction.weight must not be negative, got -1.0"),
        (GATED, dict(energy_weight=0.0), "no term trains the head"),
    ],
)
def test_terms_that_cannot_be_are_refused(head, terms, words):
    with pytest.raises(UsageError, match=words):
        objective(head, **terms)


def test_the_direction_alone_is_warned_of():
    assert "length free" in objective(energy_weight=0.0, direction_weight=1.0).warnings[0]
    assert not objective(direction_weight=2.0).warnings
