"""The flow head that predicts the clean latent, or stops early: closed forms for Gaussian latents, times of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.gaussian import Gaussian
from calm.errors import UsageError
from calm.heads.flow import FlowHead, FlowHeadConfig
from calm.heads.modulated_mlp import TIMES
from random_models import normal

DIM, LATENT, MEAN, STD = 8, 3, 0.8, 0.4
HIDDEN = jnp.asarray(normal(6, DIM))


def clean_mean(x, t):
    """E[x_1 | x_t] where x_1 ~ N(MEAN, STD^2) and x_0 ~ N(0, 1)."""
    return MEAN + t * STD**2 / (t**2 * STD**2 + (1 - t) ** 2) * (x - t * MEAN)


def knowing(config: FlowHeadConfig, says) -> FlowHead:
    """A head whose network answers `says(x, t)`."""
    model = config.build(DIM, LATENT, rngs=nnx.Rngs(0))

    def net(x, condition):
        return says(x, condition[..., :1])

    net.embed_hidden = lambda hidden: jnp.zeros((len(hidden), 1))
    net.embed_time = lambda time: time[..., None] / TIMES
    model.net = net
    return model


def velocity(x, t):
    return (clean_mean(x, t) - x) / (1 - t)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("last_time", [0.6, 0.9, 1.0])
@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_samples_have_the_distribution_that_the_best_network_gives(prediction, last_time, solver):
    """To time 1 that of the latents; before, that of E[x_1 | x_t], which is narrower by a known factor."""
    says = clean_mean if prediction == "clean" else velocity
    config = FlowHeadConfig(prediction=prediction, solver=solver, num_steps=1000, last_time=last_time)
    noise = jnp.asarray(normal(4, 6, LATENT, seed=1))
    samples = jax.jit(lambda noise: knowing(config, says)(HIDDEN, noise))(noise)
    t = last_time
    std = t * STD**2 / np.sqrt(t**2 * STD**2 + (1 - t) ** 2)  # STD at t = 1
    np.testing.assert_allclose(samples, MEAN + std * noise, atol=5e-3)  # an affine map of the noise


def test_the_two_predictions_are_one_flow():
    """Networks that say the same of x in the two ways give the same samples, at any number of steps."""
    noise = jnp.asarray(normal(4, 6, LATENT, seed=1))
    for solver, steps, last_time in (("euler", 4, 0.6), ("midpoint", 2, 0.6), ("euler", 4, 1.0)):
        config = FlowHeadConfig(solver=solver, num_steps=steps, last_time=last_time)
        clean = dataclasses.replace(config, prediction="clean")
        times = {0.0, *np.arange(config.evaluations) / 4 * last_time, last_time}
        assert all(abs(time * TIMES - round(time * TIMES)) < 1e-6 for time in times)  # the network is told the exact time
        one = jax.jit(lambda noise, config=config: knowing(config, velocity)(HIDDEN, noise))(noise)
        other = jax.jit(lambda noise, config=clean: knowing(config, clean_mean)(HIDDEN, noise))(noise)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_best_network_s_loss_is_the_variance_that_is_left_over_the_times_of_the_loss():
    share, until, rows = 0.25, 0.7, 20_000
    config = FlowHeadConfig(prediction="clean", num_draws=4, last_time=0.5, trained_until=until, start_share=share)
    posterior = Gaussian(jnp.full((rows, LATENT), MEAN), jnp.full((rows, LATENT), np.log(STD)))
    hidden = jnp.zeros((rows, DIM))

    def loss(says):
        return float(jax.jit(lambda: knowing(config, says).loss(jax.random.key(0), hidden, posterior).mean())())

    t = (np.arange(4000) + 0.5) / 4000 * until
    left = STD**2 * (1 - t) ** 2 / (t**2 * STD**2 + (1 - t) ** 2)
    best = loss(clean_mean)
    assert best == pytest.approx(share * STD**2 + (1 - share) * left.mean(), rel=0.01)
    for off in (-0.1, 0.1):
        assert loss(lambda x, t, off=off: clean_mean(x, t) + off) == pytest.approx(best + 0.01, rel=0.03)
        assert loss(lambda x, t, off=off: (1 + off) * clean_mean(x, t)) > best


def test_times_of_the_loss_are_a_share_at_the_start_and_uniform_up_to_the_last():
    seen = []
    config = FlowHeadConfig(prediction="clean", num_draws=8, last_time=0.5, trained_until=0.7, start_share=0.25)

    def says(x, t):
        seen.append(t)
        return x

    posterior = Gaussian(jnp.zeros((500, LATENT)), jnp.zeros((500, LATENT)))
    knowing(config, says).loss(jax.random.key(0), jnp.zeros((500, DIM)), posterior)
    times = np.asarray(seen[0]).reshape(8, 500)
    assert (times[:2] == 0).all() and (times[3:] > 0).all()  # a quarter of the eight strata, of every position
    assert 0.69 < times.max() <= 0.7 and times[2:].mean() == pytest.approx(0.35, abs=0.01)


def test_samples_are_a_function_of_hidden_state_and_noise():
    config = FlowHeadConfig(prediction="clean", solver="euler", num_steps=2, last_time=0.6)
    model = config.build(DIM, LATENT, rngs=nnx.Rngs(0))
    noise = jnp.asarray(normal(2, 6, LATENT))
    np.testing.assert_array_equal(model(HIDDEN, noise), model(HIDDEN, noise))
    np.testing.assert_array_equal(model(HIDDEN, noise), np.zeros((2, 6, LATENT)))  # a new network predicts the origin


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(last_time=0.0), "0 < last_time <= trained_until <= 1 must hold, got last_time=0.0"),
        (dict(last_time=0.8, trained_until=0.7), "got last_time=0.8 and trained_until=0.7"),
        (dict(trained_until=1.2), "trained_until=1.2"),
        (dict(start_share=1.0), r"start_share must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        FlowHeadConfig(**settings)
