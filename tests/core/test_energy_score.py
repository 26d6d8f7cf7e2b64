"""The energy loss: every fast form is the definition, and the definition is proper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from calm.core.energy_score import (
    FIDELITIES,
    MIN_EFFECTIVE_DIMENSIONS,
    distance,
    diversity,
    energy_loss,
    fidelity_second_order,
    fidelity_shared_draws,
    plain_energy_loss,
)
from calm.core.posterior import Gaussian
from calm.errors import UsageError
from random_models import normal

S, R, Z, M = 4, 6, 5, 7
ALPHAS = (0.3, 1.0, 1.7)
KEY = jax.random.key(0)


def case(dim: int = Z, seed: int = 0, std: float = 0.5) -> tuple[jax.Array, Gaussian]:
    samples, mean, log_std = (normal(*shape, seed=seed + i) for i, shape in enumerate([(S, R, dim), (R, dim), (R, dim)]))
    return jnp.asarray(samples), Gaussian(jnp.asarray(mean), jnp.asarray(np.log(std) + 0.2 * log_std))


def value_and_gradients(function, samples, posterior):
    """Values, and gradients with respect to the samples, the mean and log_std, of weighted positions."""
    weights = np.arange(1.0, samples.shape[1] + 1)

    def total(samples, posterior):
        values = function(samples, posterior)
        return (weights * values).sum(), values

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(samples, posterior)


def assert_close(ours, theirs, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(np.asarray(other)).max())


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_plain_form_is_the_definition(alpha):
    samples, targets = normal(S, R, Z), normal(M, R, Z, seed=1)
    ours = jax.jit(lambda samples, targets: plain_energy_loss(samples, targets, alpha=alpha))(samples, targets)
    for r in range(R):
        fidelity = np.mean([np.linalg.norm(x - y) ** alpha for x in samples[:, r] for y in targets[:, r]])
        pairs = [np.linalg.norm(samples[i, r] - samples[j, r]) ** alpha for i in range(S) for j in range(S) if i != j]
        assert ours[r] == pytest.approx(2 * fidelity - np.mean(pairs), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_loss_is_lowest_at_the_true_distribution(fidelity):
    """Many positions, each an independent estimate; the same randomness for every model, so differences are sharp."""
    positions, dim = 8000, 2 if fidelity != "second_order" else 16
    noise = normal(8, positions, dim)
    truth = Gaussian(*(jnp.asarray(np.full((positions, dim), value, np.float32)) for value in (1.0, np.log(0.5))))

    @jax.jit
    def losses(mean, std):
        samples = mean + std * jnp.asarray(noise)
        return energy_loss(samples, truth, KEY, num_draws=1 if fidelity == "draws" else 200, fidelity=fidelity)

    best = losses(1.0, 0.5)
    for mean, std in ((0.8, 0.5), (1.2, 0.5), (1.0, 0.35), (1.0, 0.65), (1.0, 0.0)):
        worse = np.asarray(losses(mean, std)) - np.asarray(best)
        assert worse.mean() > 4 * worse.std() / np.sqrt(positions), (mean, std)


# -- fast forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_shared_draws_are_the_plain_form_with_the_same_draws(alpha):
    samples, posterior = case()
    eps = jnp.asarray(normal(M, Z, seed=9))

    def plain(samples, posterior):
        return plain_energy_loss(samples, posterior.mean + posterior.std * eps[:, None], alpha=alpha)

    def fast(samples, posterior):
        return 2 * fidelity_shared_draws(samples, posterior, eps, alpha) - diversity(samples, alpha)

    assert_close(value_and_gradients(fast, samples, posterior), value_and_gradients(plain, samples, posterior))


@pytest.mark.parametrize(("num_samples", "alpha"), [(2, 1.0), (3, 0.3), (7, 1.0), (8, 1.7)])
def test_circulant_diversity_is_all_pairs(num_samples, alpha):
    samples = jnp.asarray(normal(num_samples, R, Z))

    def all_pairs(samples, _):
        pairs = distance(jnp.square(samples[:, None] - samples[None]).sum(-1), alpha)
        return pairs.sum((0, 1)) / (num_samples * (num_samples - 1))

    ours = value_and_gradients(lambda samples, _: diversity(samples, alpha), samples, samples)
    assert_close(ours, value_and_gradients(all_pairs, samples, samples))


def expected_distance(offset: np.ndarray, std: float, alpha: float) -> np.ndarray:
    """E|offset + std * normal|^alpha exactly: a moment of the noncentral chi distribution."""
    dim, square = offset.shape[-1], np.square(offset).sum(-1) / std**2
    scale = 2 ** (alpha / 2) * scipy.special.gamma((dim + alpha) / 2) / scipy.special.gamma(dim / 2)
    return std**alpha * scale * scipy.special.hyp1f1(-alpha / 2, dim / 2, -square / 2)


def exact_fidelity(samples, posterior, alpha):
    offsets = np.asarray(samples, np.float64) - np.asarray(posterior.mean)
    stds = np.asarray(posterior.std[:, 0], np.float64)  # isotropic at each position
    return np.stack([expected_distance(offsets[:, r], std, alpha).mean(0) for r, std in enumerate(stds)])


def isotropic(dim: int) -> tuple[jax.Array, Gaussian]:
    samples, posterior = case(dim)
    log_std = np.broadcast_to(np.asarray(posterior.log_std)[:, :1], posterior.mean.shape)
    return samples, Gaussian(posterior.mean, jnp.asarray(log_std))


@pytest.mark.parametrize("fidelity", ["draws", "shared_draws"])
@pytest.mark.parametrize("dim", [1, Z])
def test_draws_are_unbiased(fidelity, dim):
    samples, posterior = isotropic(dim)
    keys = jax.random.split(KEY, 2000)

    def estimate(key):
        return energy_loss(samples, posterior, key, num_draws=M, fidelity=fidelity) + diversity(samples)

    estimates = np.asarray(jax.jit(jax.vmap(estimate))(keys))
    exact = 2 * exact_fidelity(samples, posterior, 1.0)
    error = np.abs(estimates.mean(0) - exact) / (estimates.std(0) / np.sqrt(len(keys)))
    assert error.max() < 4.5 and error.mean() > 0.1


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_second_order_form_is_accurate_over_many_even_dimensions(alpha):
    samples, posterior = isotropic(64)
    nothing = jnp.full((1, 64), jnp.nan)  # no draw is used
    ours = jax.jit(lambda: fidelity_second_order(samples, posterior, nothing, alpha))()
    np.testing.assert_allclose(ours, exact_fidelity(samples, posterior, alpha), rtol=2e-4)


def test_at_the_threshold_the_worst_case_is_off_by_one_percent():
    """All variance in one dimension, the others a constant: the least even posterior of so many effective dimensions."""
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    posterior = Gaussian(jnp.zeros((1, 2)), jnp.asarray([[0.0, -20.0]]))

    run = jax.jit(lambda sample: fidelity_second_order(sample, posterior, jnp.full((1, 2), jnp.nan), 1.0))

    def bias(effective_dimensions: float) -> float:
        constant = np.sqrt(effective_dimensions) - 1  # q = 1 + constant, v = 2, so 2 q^2 / v = q^2
        sample = jnp.asarray([[[0.0, np.sqrt(constant)]]] * 2, jnp.float32)
        ours = float(run(sample)[0])
        return abs(ours / (weights @ np.sqrt(points**2 + constant) / weights.sum()) - 1)

    assert 0.008 < bias(MIN_EFFECTIVE_DIMENSIONS * 1.001) < 0.01


def test_positions_without_enough_effective_dimensions_fall_back_to_draws_and_the_others_do_not():
    samples, posterior = case(64)
    log_std, samples = np.array(posterior.log_std), np.array(samples)
    log_std[1], log_std[1, 0] = -9.0, 2.0  # one dominant dimension at position 1
    samples[:, 1] = posterior.mean[1]
    samples, uneven = jnp.asarray(samples), Gaussian(posterior.mean, jnp.asarray(log_std))
    eps = jnp.asarray(normal(M, 64, seed=9))
    mixed, even = (
        value_and_gradients(lambda s, p: fidelity_second_order(s, p, eps, 1.0), samples, target)
        for target in (uneven, posterior)
    )
    drawn = value_and_gradients(lambda s, p: fidelity_shared_draws(s, p, eps, 1.0), samples, uneven)
    rows = np.arange(R) != 1
    for ((expected, expected_target), values), row in ((drawn, ~rows), (even, rows)):
        (gradient, target), ours = mixed
        assert_close(ours[row], values[row])
        assert_close(gradient[:, row], expected[:, row])
        assert_close([x[row] for x in target], [x[row] for x in expected_target])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mixed))


def test_one_latent_dimension_always_falls_back_to_draws():
    samples, posterior = case(1)
    eps = jnp.asarray(normal(M, 1, seed=9))
    second, drawn = (
        jax.jit(f, static_argnums=3)(samples, posterior, eps, 1.0) for f in (fidelity_second_order, fidelity_shared_draws)
    )
    np.testing.assert_allclose(second, drawn, rtol=1e-6)


# -- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_identical_samples_have_finite_gradients_and_no_diversity(fidelity):
    samples, posterior = jnp.ones((8, 3, 2)), Gaussian(jnp.ones((3, 2)), jnp.full((3, 2), -30.0))

    def loss(samples):
        return energy_loss(samples, posterior, KEY, num_draws=5, fidelity=fidelity).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(samples)
    assert jnp.isfinite(gradient).all() and jnp.abs(value) < 1e-5
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda samples: diversity(samples).sum()))(samples), 0)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_leading_axes_are_positions(fidelity):
    samples, posterior = case(16)
    folded = Gaussian(*(x.reshape(2, 3, 16) for x in posterior))
    run = jax.jit(lambda samples, posterior: energy_loss(samples, posterior, KEY, num_draws=M, fidelity=fidelity))
    flat, shaped = run(samples, posterior), run(samples.reshape(S, 2, 3, 16), folded)
    assert flat.shape == (R,)
    np.testing.assert_allclose(shaped.reshape(-1), flat, rtol=1e-6)


def test_what_is_not_proper_is_refused():
    samples, posterior = case()
    for alpha in (0.0, 2.0, -1.0):
        with pytest.raises(UsageError, match=r"alpha must lie in \(0, 2\)"):
            energy_loss(samples, posterior, KEY, alpha=alpha)
    with pytest.raises(UsageError, match="at least 2 samples of the model, got S=1"):
        energy_loss(samples[:1], posterior, KEY)
