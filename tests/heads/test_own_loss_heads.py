"""The heads that have a loss of their own: what every one of them must do, and the closed forms that each must meet."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from calm.core.dense import PRECISIONS
from calm.core.gaussian import Gaussian
from calm.errors import UsageError
from calm.heads.diffusion import DiffusionHeadConfig, schedule
from calm.heads.flow import FlowHeadConfig
from calm.heads.mixture import MixtureHeadConfig
from calm.heads.modulated_mlp import TIMES, stratified, time_waves
from jaxpr_flops import matmul_flops
from random_models import Layer, normal, random_model

HEADS = {
    "midpoint": FlowHeadConfig(num_blocks=2, num_steps=3, num_draws=3),
    "euler": FlowHeadConfig(num_blocks=2, solver="euler", num_steps=5, num_draws=3),
    "clean": FlowHeadConfig(
        num_blocks=2,
        solver="euler",
        num_steps=4,
        num_draws=3,
        prediction="clean",
        last_time=0.6,
        trained_until=0.7,
        start_share=0.2,
    ),
    "residual": FlowHeadConfig(num_blocks=2, solver="euler", num_steps=5, num_draws=3, network="residual"),
    "diffusion": DiffusionHeadConfig(num_blocks=2, num_steps=4, num_draws=3),
    "mixture": MixtureHeadConfig(num_blocks=2, num_components=3, num_draws=3),
}
SAMPLES, DIM, LATENT = 3, 8, 5
HIDDEN = normal(2, 4, DIM)
POSTERIOR = Gaussian(normal(2, 4, LATENT, seed=1), 0.3 * normal(2, 4, LATENT, seed=2) - 1)
every_head = pytest.mark.parametrize("name", HEADS)


def head(name: str, precision: str = "float32"):
    return random_model(Layer(lambda rngs: HEADS[name].build(DIM, LATENT, rngs=rngs, precision=precision)))


@every_head
def test_each_sample_depends_on_its_noise_and_its_position_only(name):
    model = head(name)
    run = jax.jit(lambda hidden, noise: model(hidden, noise))
    noise = np.array(model.draw_noise(jax.random.key(0), (SAMPLES, 2, 4)))
    before, hidden = np.asarray(run(HIDDEN, noise)), HIDDEN.copy()
    assert before.shape == (SAMPLES, 2, 4, LATENT) and noise.shape == (SAMPLES, 2, 4, model.noise_dim)
    hidden[0, 1] += 1.0
    noise[2, 1, 3, -LATENT:] += 1.0
    changed = np.abs(np.asarray(run(hidden, noise)) - before).max(-1) > 1e-6
    expected = np.zeros((SAMPLES, 2, 4), bool)
    expected[:, 0, 1] = expected[2, 1, 3] = True
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@every_head
def test_a_sample_alone_is_the_sample_among_others(name, precision):
    model = head(name, precision)
    noise = model.draw_noise(jax.random.key(0), (SAMPLES, 2, 4))
    together = jax.jit(lambda hidden, noise: model(hidden, noise))(HIDDEN, noise)
    alone = jax.jit(lambda hidden, noise: model(hidden, noise))(HIDDEN[1, 2:3], noise[1:2, 1, 2:3])
    np.testing.assert_allclose(alone[0, 0], together[1, 1, 2], atol=2e-5 if precision == "float32" else 0.1)


@every_head
def test_losses_are_apart_by_position_and_train_every_weight(name):
    model = head(name)
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, hidden):
        def total(params, hidden):
            losses = nnx.merge(graphdef, params).loss(jax.random.key(3), hidden, POSTERIOR)
            return losses[0, 1], losses

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, hidden)

    (weights, by_hidden), losses = run(params, jnp.asarray(HIDDEN))
    assert losses.shape == (2, 4) and np.isfinite(losses).all()
    assert min(np.abs(g).max() for g in jax.tree.leaves(weights)) > 0
    touched = np.abs(by_hidden).max(-1) > 0
    assert touched[0, 1] and touched.sum() == 1


@every_head
def test_flops_are_those_of_the_products_in_the_program(name):
    config, positions = HEADS[name], 6
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(DIM, LATENT, rngs=nnx.Rngs(0))))
    hidden = jax.ShapeDtypeStruct((positions, DIM), jnp.float32)
    width = nnx.merge(graphdef, params).noise_dim
    noise = jax.ShapeDtypeStruct((SAMPLES, positions, width), jnp.float32)
    latent = jax.ShapeDtypeStruct((positions, LATENT), jnp.float32)
    made = matmul_flops(lambda params, hidden, noise: nnx.merge(graphdef, params)(hidden, noise), params, hidden, noise)
    calls = {"midpoint": 6, "euler": 5, "clean": 5, "residual": 5, "diffusion": 4, "mixture": 0}[name]
    times = calls * 2 * (256 * DIM + DIM * DIM)  # embedded once for all positions
    assert made == positions * config.flops(DIM, LATENT, SAMPLES) + times

    def loss(params, hidden, mean, log_std):
        return nnx.merge(graphdef, params).loss(jax.random.key(0), hidden, Gaussian(mean, log_std))

    assert matmul_flops(loss, params, hidden, latent, latent) == positions * config.loss_flops(DIM, LATENT)


# A law with two far modes at one hidden state and a single one at the other.
CONTEXTS, FAR, STD, SHARE = normal(2, DIM, seed=5), 2.0, 0.3, 0.7


@pytest.mark.parametrize(
    ("config", "width", "learning_rate"),
    [
        (FlowHeadConfig(num_blocks=1, num_draws=4), STD, 1e-2),
        # the spread of E[x_1 | x_t] at t = .7: t STD^2 / sqrt(t^2 STD^2 + (1 - t)^2)
        (FlowHeadConfig(num_blocks=1, num_draws=4, prediction="clean", solver="euler", last_time=0.7), 0.172, 1e-2),
        (DiffusionHeadConfig(num_blocks=1, num_steps=25, num_draws=4), STD, 1e-2),
        (MixtureHeadConfig(num_blocks=1, num_components=8, num_draws=4), STD, 5e-3),
    ],
    ids=["flow", "clean", "diffusion", "mixture"],
)
def test_training_finds_both_modes_their_shares_and_their_widths(config, width, learning_rate):
    rows, dim, steps = 128, 2, 400
    graphdef, params = nnx.split(config.build(DIM, dim, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, key):
        params, state = carry
        which, sign, draw = jax.random.split(key, 3)
        which = jax.random.bernoulli(which, 0.5, (rows,)).astype(jnp.int32)
        far = jnp.where(jax.random.bernoulli(sign, SHARE, (rows, 1)), FAR, -FAR)
        mean = jnp.where(which[:, None] == 0, far, 1.0) * jnp.ones((rows, dim))
        posterior = Gaussian(mean, jnp.full((rows, dim), np.log(STD)))

        def loss(params):
            return nnx.merge(graphdef, params).loss(draw, jnp.asarray(CONTEXTS)[which], posterior).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(0), steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return nnx.merge(graphdef, params).sample(jax.random.key(1), jnp.asarray(CONTEXTS), 2000)

    samples = np.asarray(run(params))
    two, one = samples[:, 0], samples[:, 1]
    high = two[:, 0] > 0
    assert (np.sign(two[:, 0]) == np.sign(two[:, 1])).mean() > 0.99  # the modes are joint over dimensions
    assert high.mean() == pytest.approx(SHARE, abs=0.05)
    for mode, mean in ((two[high], FAR), (two[~high], -FAR), (one, 1.0)):
        np.testing.assert_allclose(mode.mean(0), mean, atol=0.1)
        np.testing.assert_allclose(mode.std(0), width, atol=0.15)


def test_the_midpoint_rule_is_of_second_order_and_euler_of_first():
    """For v = a x the flow multiplies by e^a: errors shrink by 4 and by 2 as the steps double."""

    def error(solver: str, num_steps: int) -> float:
        model = FlowHeadConfig(solver=solver, num_steps=num_steps).build(DIM, LATENT, rngs=nnx.Rngs(0))
        model.net = lambda x, condition: 0.7 * x
        model.net.embed_hidden = lambda hidden: hidden[:, :1]
        model.net.embed_time = lambda time: jnp.zeros(time.shape)[..., None]
        return float(np.abs(np.asarray(model(jnp.asarray(HIDDEN), jnp.ones((1, 2, 4, LATENT)))) - np.exp(0.7)).max())

    assert error("midpoint", 8) / error("midpoint", 16) == pytest.approx(4, rel=0.1)
    assert error("euler", 8) / error("euler", 16) == pytest.approx(2, rel=0.1)


def test_log_density_is_that_of_the_components_and_integrates_to_one():
    model = random_model(Layer(lambda rngs: MixtureHeadConfig(num_components=3).build(DIM, 2, rngs=rngs)))
    hidden = HIDDEN[0, :1]
    weights, means, stds = (np.asarray(x, np.float64)[0] for x in jax.jit(model.mixture)(hidden))
    axis = np.linspace(-12, 12, 321)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2).astype(np.float32)
    ours = np.asarray(jax.jit(model.log_density)(hidden, grid))[:, 0]
    scaled = (grid - means) / stds
    parts = np.exp(weights - 0.5 * (scaled**2).sum(-1) - np.log(stds).sum(-1)) / (2 * np.pi)
    np.testing.assert_allclose(np.exp(ours), parts.sum(-1), rtol=1e-3, atol=1e-12)
    assert np.exp(ours).sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_mixture_samples_have_the_moments_of_the_mixture():
    model = head("mixture")
    weights, means, stds = (np.asarray(x, np.float64) for x in jax.jit(model.mixture)(HIDDEN[0]))
    samples = np.asarray(jax.jit(lambda hidden: model.sample(jax.random.key(0), hidden, 40_000))(jnp.asarray(HIDDEN[0])))
    weights = np.exp(weights)[..., None]
    mean = (weights * means).sum(1)
    spread = np.sqrt((weights * (stds**2 + means**2)).sum(1) - mean**2)
    np.testing.assert_allclose(samples.mean(0), mean, atol=4 * spread.max() / 200)
    np.testing.assert_allclose(samples.std(0), spread, rtol=0.03)


@pytest.mark.parametrize("num_steps", [2, 10, 100, TIMES])
def test_the_schedule_is_a_gaussian_process_at_any_spacing(num_steps):
    steps = jax.tree.map(lambda x: np.asarray(x, np.float64), schedule(num_steps))
    np.testing.assert_allclose(steps.signal**2 + steps.noise**2, 1, rtol=1e-6)
    assert steps.times[0] == 0 and steps.times[-1] == TIMES - 1 and (np.diff(steps.times) > 0).all()
    whole = jax.tree.map(lambda x: np.asarray(x, np.float64)[steps.times.astype(int)], schedule())
    np.testing.assert_allclose(steps.signal, whole.signal, rtol=1e-6)
    # E[x_{t-1} | x_0] and its variance, through x_t: signal_{t-1} x_0 and noise_{t-1}^2
    signal, noise = steps.signal[1:], steps.noise[1:]
    np.testing.assert_allclose(steps.of_clean[1:] + steps.of_noisy[1:] * signal, steps.signal[:-1], rtol=1e-4)
    variance = np.exp(steps.low[1:]) + (steps.of_noisy[1:] * noise) ** 2
    np.testing.assert_allclose(variance, steps.noise[:-1] ** 2, rtol=1e-3)
    np.testing.assert_allclose([steps.of_clean[0], steps.of_noisy[0]], [1, 0], atol=1e-3)
    assert (steps.low <= steps.high + 1e-6).all()


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_a_diffusion_step_that_knows_the_latent_is_the_true_step(prediction):
    """At every time, what the network should say leads to the mean of x_{t-1} given x_t and x_0."""
    model = DiffusionHeadConfig(prediction=prediction).build(DIM, LATENT, rngs=nnx.Rngs(0))
    clean, noise = normal(4, LATENT), normal(4, LATENT, seed=1)
    for index in (0, 17, 500, 990):
        at = schedule().at(jnp.full((4,), index))
        x = at.signal * clean + at.noise * noise
        said = at.signal * noise - at.noise * clean if prediction == "velocity" else noise
        for share, bound in ((-1.0, at.low), (1.0, at.high)):
            mean, log_variance = model._step(x, jnp.concatenate([said, jnp.full_like(said, share)], -1), at)
            np.testing.assert_allclose(mean, at.of_clean * clean + at.of_noisy * x, atol=2e-3)
            np.testing.assert_allclose(log_variance, jnp.broadcast_to(bound, mean.shape), rtol=1e-5)


def test_a_diffusion_sample_is_the_chain_of_its_steps_and_the_last_adds_no_noise():
    model, steps = head("diffusion"), schedule(4)
    noise = normal(SAMPLES, 4, 4, LATENT)

    @jax.jit
    def chain(hidden, noise):
        x = noise[:, :, 0]
        for place, index in enumerate((3, 2, 1, 0)):
            condition = model.net.embed_hidden(hidden)[None] + model.net.embed_time(steps.times[index])
            mean, log_variance = model._step(x, model.net(x, condition), steps.at(jnp.asarray(index)))
            x = mean + jnp.exp(0.5 * log_variance) * noise[:, :, place + 1] if index else mean
        return x, model(hidden, noise.reshape(SAMPLES, 4, -1))

    by_hand, ours = chain(HIDDEN[0], noise)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_a_diffusion_network_that_knows_the_latent_and_the_least_variance_has_no_loss(prediction):
    model = DiffusionHeadConfig(prediction=prediction).build(DIM, LATENT, rngs=nnx.Rngs(0))
    clean = POSTERIOR.mean.reshape(-1, LATENT)

    def knows(x, condition):
        at = schedule().at(condition[..., 0].astype(jnp.int32))
        noise = (x - at.signal * clean) / at.noise
        said = at.signal * noise - at.noise * clean if prediction == "velocity" else noise
        return jnp.concatenate([said, -jnp.ones_like(said)], axis=-1)

    knows.embed_hidden = lambda hidden: jnp.zeros((len(hidden), 1))
    knows.embed_time = lambda time: time[..., None].astype(jnp.float32)
    model.net = knows
    sharp = Gaussian(jnp.asarray(POSTERIOR.mean), jnp.full((2, 4, LATENT), -20.0))
    losses = jax.jit(lambda: model.loss(jax.random.key(1), jnp.asarray(HIDDEN), sharp))()
    np.testing.assert_allclose(losses, 0, atol=1e-3)


def test_times_are_waves_and_strata_hold_one_draw_each():
    waves = np.asarray(time_waves(jnp.asarray([0, 3])))
    np.testing.assert_array_equal(waves[0], np.repeat([1.0, 0.0], 128))
    np.testing.assert_allclose(waves[1, [0, 128, 127]], [np.cos(3), np.sin(3), np.cos(3 * 10_000 ** (-127 / 128))], rtol=1e-5)
    parts = np.asarray(stratified(jax.random.uniform(jax.random.key(0), (8, 50))))
    np.testing.assert_array_equal(np.floor(parts * 8), np.broadcast_to(np.arange(8)[:, None], (8, 50)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowHeadConfig(num_steps=0), "num_steps and num_draws must be at least 1"),
        (lambda: DiffusionHeadConfig(num_steps=1), "num_steps must lie in 2 .. 1000, got 1"),
        (lambda: DiffusionHeadConfig(num_steps=1001), "num_steps must lie in 2 .. 1000, got 1001"),
        (lambda: DiffusionHeadConfig(num_blocks=0), "num_blocks and num_draws must be at least 1"),
        (lambda: MixtureHeadConfig(num_components=0), "num_components and num_draws must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()
