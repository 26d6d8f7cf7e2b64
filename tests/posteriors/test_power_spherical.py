"""The power-spherical law: density, divergence, draws and moments agree with one another, on the sphere and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from calm.core import clipped_kl
from calm.core.energy_score import FIDELITIES, diversity, energy_loss, energy_parts, fidelity_second_order
from calm.core.posterior import POSTERIORS, PowerSpherical
from calm.posteriors.power_spherical import MAX_SHARPNESS
from random_models import normal

KEY = jax.random.key(0)
DRAWS = 40_000


def law(size: int, concentration: float, seed: int = 0) -> PowerSpherical:
    direction = normal(size, seed=seed)
    return PowerSpherical(jnp.asarray(direction / np.linalg.norm(direction)), jnp.log(jnp.asarray([concentration])))


@functools.cache
def drawn(size: int, concentration: float) -> np.ndarray:
    return np.asarray(jax.jit(lambda: law(size, concentration).draws(KEY, DRAWS))(), np.float64)


CASES = [(2, 0.7), (3, 4.0), (16, 0.01), (16, 300.0)]


@pytest.mark.parametrize(("size", "concentration"), CASES)
def test_draws_lie_on_the_sphere_of_radius_root_z(size, concentration):
    np.testing.assert_allclose(np.linalg.norm(drawn(size, concentration), axis=-1), size**0.5, rtol=1e-5)
    one = law(size, concentration)
    np.testing.assert_array_equal(one.sample(KEY), one.draws(KEY, 1)[0])
    off = jnp.asarray([normal(size), 0.01 * normal(size, seed=1)])
    onto = one.onto(off)
    np.testing.assert_allclose(jnp.linalg.norm(onto, axis=-1), size**0.5, rtol=1e-4)
    np.testing.assert_allclose(onto / onto[:, :1], off / off[:, :1], rtol=1e-4)
    np.testing.assert_allclose(one.onto(one.mean), one.radius * one.direction, rtol=1e-4)


@pytest.mark.parametrize(("size", "concentration"), CASES)
def test_draws_have_the_law_whose_density_is_given(size, concentration):
    """Along the direction by its distribution function, integrated from `log_prob`; across it, evenly to all sides."""
    one = law(size, concentration)
    direction = np.asarray(one.direction, np.float64)
    cosine = drawn(size, concentration) @ direction / size**0.5
    side = np.linalg.svd(direction[None])[2][1]  # any direction across
    angles = np.linspace(0, np.pi, 2001)
    points = size**0.5 * (np.cos(angles)[:, None] * direction + np.sin(angles)[:, None] * side)
    density = np.exp(np.asarray(jax.jit(jax.vmap(one.log_prob))(jnp.asarray(points[:-1], jnp.float32)), np.float64).sum(-1))
    half = 0.5 * (size - 1)
    rim = 2 * np.pi**half / scipy.special.gamma(half) * (size**0.5 * np.sin(angles[:-1])) ** (size - 2)  # the parallel's size
    total = scipy.integrate.cumulative_simpson(density * rim * size**0.5, x=angles[:-1], initial=0)
    assert total[-1] == pytest.approx(1, abs=2e-3)
    found = scipy.stats.kstest(np.arccos(np.clip(cosine, -1, 1)), lambda x: np.interp(x, angles[:-1], total / total[-1]))
    assert found.statistic < 1.95 * DRAWS**-0.5
    if size == 2:  # two sides
        assert abs(np.sign(drawn(size, concentration) @ side).mean()) < 4.5 * DRAWS**-0.5
        return
    across = drawn(size, concentration) @ side / np.sqrt(np.maximum(size * (1 - cosine**2), 1e-9))
    known = scipy.stats.kstest(np.clip(across, -1, 1), scipy.stats.beta(0.5 * (size - 2), 0.5 * (size - 2), -1, 2).cdf)
    assert known.statistic < 1.95 * DRAWS**-0.5


@pytest.mark.parametrize(("size", "concentration"), CASES)
def test_mean_and_std_are_those_of_draws(size, concentration):
    one, draws = law(size, concentration), drawn(size, concentration)
    np.testing.assert_allclose(draws.mean(0), one.mean, atol=4.5 * float(one.std.max()) * DRAWS**-0.5)
    np.testing.assert_allclose(draws.std(0), one.std, rtol=4.5 * DRAWS**-0.5)


@pytest.mark.parametrize(("size", "concentration"), CASES)
def test_kl_is_the_expected_log_ratio_to_the_uniform_law(size, concentration):
    one, uniform = law(size, concentration), law(size, 0.0)
    draws = jnp.asarray(drawn(size, concentration), jnp.float32)
    ratio = np.asarray(jax.jit(jax.vmap(lambda y: (one.log_prob(y) - uniform.log_prob(y)).sum()))(draws), np.float64)
    assert one.kl().sum() == pytest.approx(ratio.mean(), abs=4.5 * ratio.std() * DRAWS**-0.5 + 1e-4)
    np.testing.assert_array_equal(one.kl(), one.kl()[0])  # equal shares of the dimensions
    area = 2 * np.pi ** (size / 2) / scipy.special.gamma(size / 2) * size ** (0.5 * (size - 1))
    np.testing.assert_allclose(uniform.log_prob(draws[0]).sum(), -np.log(area), rtol=1e-5)


def test_kl_vanishes_with_the_concentration_and_grows_with_it():
    values = [float(law(64, concentration).kl().sum()) for concentration in (0.0, 1e-3, 1.0, 60.0, 3000.0, 1e5)]
    assert abs(values[0]) < 1e-4 and abs(values[1]) < 1e-4
    assert np.all(np.diff(values[1:]) > 0)
    slope = jax.jit(jax.grad(lambda x: PowerSpherical(law(64, 1.0).direction, x).kl().sum()))
    assert float(slope(jnp.asarray([-9.0]))[0]) == pytest.approx(0, abs=1e-4)
    assert float(slope(jnp.asarray([11.0]))[0]) == pytest.approx(31.5, rel=0.05)  # (Z - 1) / 2 a unit: as of Z - 1 log_stds
    bound = PowerSpherical.of(jnp.full((65,), 100.0))
    assert float(bound.log_concentration[0]) == pytest.approx(MAX_SHARPNESS + np.log(63)) and np.isfinite(bound.kl()).all()


def test_the_clamp_is_on_the_chunk_and_has_no_gradient_below():
    """clamp nats a dimension are Z * clamp nats a chunk."""

    def clipped(x):
        return clipped_kl(PowerSpherical(law(8, 1.0).direction, x).kl(), 0.5)

    weak, sharp = jnp.asarray([1.0]), jnp.asarray([6.0])
    assert law(8, np.e).kl().sum() < 4 < law(8, np.exp(6.0)).kl().sum()
    assert clipped(weak) == pytest.approx(4.0) and float(jax.grad(lambda x: clipped(x))(weak)[0]) == 0
    assert clipped(sharp) == pytest.approx(float(law(8, np.exp(6.0)).kl().sum()), rel=1e-5)
    assert float(jax.grad(lambda x: clipped(x))(sharp)[0]) > 1


@pytest.mark.parametrize("concentration", [0.5, 20.0])
def test_the_gradient_of_draws_is_that_of_the_expectation(concentration):
    """E cos^2 is a closed form of the concentration; E (y . v)^2 also moves with the direction."""
    size, side = 5, jnp.asarray(normal(5, seed=3))

    def expected(direction, log_concentration):
        one = PowerSpherical(direction / jnp.linalg.norm(direction), log_concentration)
        along, across = one._variances()
        height = side @ one.direction
        mean = side @ one.mean
        return mean**2 + size * (along * height**2 + across * (side @ side - height**2))

    def estimated(direction, log_concentration, key):
        one = PowerSpherical(direction / jnp.linalg.norm(direction), log_concentration)
        return jnp.square(one.draws(key, 4000) @ side).mean()

    at = (jnp.asarray(normal(size)), jnp.log(jnp.asarray([concentration])))
    exact = jax.jit(jax.grad(expected, argnums=(0, 1)))(*at)
    gradient = jax.vmap(jax.grad(estimated, argnums=(0, 1)), in_axes=(None, None, 0))
    ours = jax.jit(gradient)(*at, jax.random.split(KEY, 60))
    step = 1e-2
    slope = (expected(at[0], at[1] + step) - expected(at[0], at[1] - step)) / (2 * step)  # and that by differences
    assert float(exact[1][0]) == pytest.approx(float(slope), rel=1e-2)
    for one, other in zip(ours, exact, strict=True):
        one = np.asarray(one, np.float64)
        assert np.abs((one.mean(0) - other) / (one.std(0) / 60**0.5)).max() < 4.5


# -- as the target of the energy score --------------------------------------------------------------------------------


def targets(size: int, concentration: float, rows: int = 3) -> PowerSpherical:
    return jax.tree.map(lambda *x: jnp.stack(x), *[law(size, concentration * (1 + row), seed=row) for row in range(rows)])


def samples_near(posterior: PowerSpherical, spread: float, count: int = 4) -> jax.Array:
    return posterior.mean + spread * jnp.asarray(normal(count, *posterior.mean.shape, seed=7))


def test_moments_of_the_squared_distance_are_those_of_draws():
    posterior = targets(6, 3.0)
    points = samples_near(posterior, 1.0)
    mean, variance = posterior.squared_distance_moments(points)
    squares = jax.jit(lambda: jnp.square(points[None] - posterior.draws(KEY, DRAWS)[:, None]).sum(-1))()
    np.testing.assert_allclose(mean, squares.mean(0), rtol=0.02)
    np.testing.assert_allclose(variance, squares.var(0), rtol=0.05)


def test_shared_distances_are_those_of_draws_on_the_sphere():
    """The same law as independent draws; and seen from the centre, every draw is sqrt(Z) away."""
    posterior = targets(6, 3.0)
    centre = posterior.squared_distances(jnp.zeros((1, 3, 6)), posterior.shared_noise(KEY, 50))
    np.testing.assert_allclose(centre, 6.0, rtol=1e-4)
    points = samples_near(posterior, 1.0, count=1)
    shared = posterior.squared_distances(points, posterior.shared_noise(KEY, 4000))[0]
    free = jnp.square(points - posterior.draws(jax.random.key(5), 4000)).sum(-1).T
    for one, other in zip(np.asarray(shared), np.asarray(free), strict=True):
        assert scipy.stats.ks_2samp(one, other).statistic < 1.95 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("concentration", [0.1, 60.0, 2000.0])
def test_the_second_order_form_is_the_expectation_over_many_dimensions(alpha, concentration):
    posterior = targets(64, concentration)
    points = jnp.concatenate([samples_near(posterior, 0.3), posterior.radius * posterior.direction[None]])
    nothing = posterior.shared_noise(KEY, 1)._replace(normal=jnp.full((1, 64), jnp.nan))  # no draw is used
    ours = jax.jit(lambda: fidelity_second_order(points, posterior, nothing, alpha))()
    draws = posterior.draws(KEY, 4000)
    exact = jnp.square(points[:, None] - draws[None]).sum(-1) ** (alpha / 2)
    np.testing.assert_allclose(ours, exact.mean((0, 1)), rtol=3e-3)


def test_few_dimensions_fall_back_to_draws_of_the_sphere():
    posterior = targets(2, 1.0)
    points = samples_near(posterior, 0.5)
    run = jax.jit(energy_parts, static_argnames=("num_draws", "fidelity"))
    second, shared = (run(points, posterior, KEY, num_draws=50, fidelity=name) for name in FIDELITIES[:0:-1])
    np.testing.assert_allclose(second[0], shared[0], rtol=1e-5)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_energy_score_is_lowest_for_the_spherical_law_itself(fidelity):
    """Against its Gaussian of the same moments, against less and more spread: the same target for all."""
    truth = targets(4, 3.0, rows=1)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (1500, x.shape[-1])), truth)
    count = 20 if fidelity == "draws" else 600  # shared by all positions: few would be another law

    @jax.jit
    def score(samples):
        return energy_loss(samples, rows, jax.random.key(9), num_draws=count, fidelity=fidelity).mean()

    gaussian = rows.mean + rows.std * jnp.asarray(normal(8, 1500, 4))
    laws = [rows, *(rows._replace(log_concentration=rows.log_concentration + shift) for shift in (-1.0, 1.0))]
    right, *wrong = [score(each.draws(jax.random.key(2), 8)) for each in laws]
    assert all(right < other for other in (*wrong, score(gaussian))), (right, wrong, score(gaussian))
    assert diversity(truth.draws(KEY, 8)).shape == (1,)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_every_law_answers_to_the_same_names(kind):
    @jax.jit
    def of(outputs):
        law = POSTERIORS[kind].of(outputs)
        return law.mean, law.std, law.sample(KEY), law.kl(), law.log_prob(law.mean), law.draws(KEY, 2)

    *of_chunks, draws = of(normal(3, 5, POSTERIORS[kind].outputs(6)))
    for values in of_chunks:
        assert values.shape == (3, 5, 6) and np.isfinite(values).all()
    assert draws.shape == (2, 3, 5, 6) and (of_chunks[1] > 0).all()
