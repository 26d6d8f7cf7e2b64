"""The energy loss: a strictly proper score for a model that can only be sampled.

    loss = 2 E|x - y|^alpha - E|x - x'|^alpha,    x, x' ~ model, y ~ posterior of the true next chunk, 0 < alpha < 2

Its minimum over distributions is the true one (Gneiting and Raftery 2007). The first term is the fidelity, the second the
diversity. Source: CALM, arXiv:2510.27688; its N model samples are our S, and its code calls alpha beta.

The target is a known distribution (`calm.core.posterior`), so the fidelity has three equal formulations (`Fidelity`):

    draws         M draws per position, all differences formed: the definition, and the published code. S*M*Z work per position.
    shared_draws  the same M standard normals at every position. |x - y|^2 expands into products of matrices, so the
                  differences are never formed. Unbiased for any fixed position; positions share their noise.
    second_order  no draws. With q and v the mean and the variance of the squared distance, which are closed forms,
                  E d^alpha = q^(alpha/2) (1 - alpha (2 - alpha) v / (8 q^2)) up to third order. Accurate where the squared
                  distance is a sum of many comparable terms; where 2 q^2 / v < 8 (effective dimensions) shared draws are used.

Each law brings its own q, v and draws, so that no formula of one is used for another. On a sphere the squared distance is
linear in the draw, whose height along the direction is about as skewed as a Gaussian's sum of squares, so the same bound on
2 q^2 / v serves.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.core.posterior import Posterior
from calm.errors import UsageError
from calm.rng import PRNGKey

Fidelity = Literal["draws", "shared_draws", "second_order"]
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)

MIN_EFFECTIVE_DIMENSIONS = 8.0  # below, the second-order formula's bias passes 1 %: tests/losses/test_energy_score.py


def distance(squared: Float[Array, "*b"], alpha: float) -> Float[Array, "*b"]:
    """squared^(alpha/2), with value and gradient 0 at 0, where a plain root has an infinite slope.

    Expanded squares may come out slightly negative; they count as 0.
    """
    positive = squared > 1e-12
    return jnp.where(positive, jnp.where(positive, squared, 1.0) ** (alpha / 2), 0.0)


def energy_loss(
    samples: Float[Array, "S *b Z"],
    posterior: Posterior,
    key: PRNGKey,
    *,
    num_draws: int = 100,
    alpha: float = 1.0,
    fidelity: Fidelity = "second_order",
) -> Float[Array, "*b"]:
    """The energy loss at every position: lower is better, nothing is reduced.

    Args:
        samples: S >= 2 draws of the model.
        posterior: the encoder's distribution of the true next chunk's latent.
        num_draws: M, for the formulations that draw.
        alpha: exponent in (0, 2). The paper trains with 1; at 2 the score no longer sees more than the mean.
        fidelity: see the module.
    """
    fidelity_part, diversity_part = energy_parts(samples, posterior, key, num_draws=num_draws, alpha=alpha, fidelity=fidelity)
    return 2 * fidelity_part - diversity_part


def energy_parts(
    samples: Float[Array, "S *b Z"],
    posterior: Posterior,
    key: PRNGKey,
    *,
    num_draws: int = 100,
    alpha: float = 1.0,
    fidelity: Fidelity = "second_order",
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """E|x - y|^alpha and E|x - x'|^alpha at every position: fidelity and diversity. The loss is twice the first minus the
    second. Arguments as of `energy_loss`.
    """
    if samples.shape[0] < 2:
        raise UsageError(f"the energy loss needs at least 2 samples of the model, got S={samples.shape[0]}")
    if not 0.0 < alpha < 2.0:
        raise UsageError(f"alpha must lie in (0, 2), got {alpha}")
    if fidelity not in FIDELITIES:
        raise UsageError(f"unknown fidelity {fidelity!r}; choose one of {', '.join(FIDELITIES)}")
    flat = samples.reshape(samples.shape[0], -1, samples.shape[-1])
    target = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), posterior)
    if fidelity == "draws":
        fidelities = _between(flat, target.draws(key, num_draws), alpha).mean((0, 1))
    else:
        expected = fidelity_shared_draws if fidelity == "shared_draws" else fidelity_second_order
        fidelities = expected(flat, target, target.shared_noise(key, num_draws), alpha)
    shape = samples.shape[1:-1]
    return fidelities.reshape(shape), diversity(flat, alpha).reshape(shape)


def _between(a: Float[Array, "S *b Z"], b: Float[Array, "M *b Z"], alpha: float) -> Float[Array, "S M *b"]:
    """|a - b|^alpha of all pairs."""
    return distance(jnp.square(a[:, None] - b[None]).sum(-1), alpha)


def plain_energy_loss(
    samples: Float[Array, "S *b Z"], targets: Float[Array, "M *b Z"], *, alpha: float = 1.0
) -> Float[Array, "*b"]:
    """The definition, term by term: the reference for the fast forms. The diagonal of x - x' counts for nothing."""
    num_samples = samples.shape[0]
    others = _between(samples, samples, alpha).sum((0, 1)) / (num_samples * (num_samples - 1))
    return 2 * _between(samples, targets, alpha).mean((0, 1)) - others


def fidelity_shared_draws(samples: Float[Array, "S R Z"], posterior: Posterior, noise: Any, alpha: float) -> Float[Array, "R"]:
    """Mean over S and M of |x_s - y_m|^alpha; `noise` is the posterior's `shared_noise`."""
    return distance(posterior.squared_distances(samples, noise), alpha).mean((0, 2))


def fidelity_second_order(samples: Float[Array, "S R Z"], posterior: Posterior, noise: Any, alpha: float) -> Float[Array, "R"]:
    """E|x_s - y|^alpha over the posterior to second order, averaged over S; shared draws where that is not accurate.

    The draws are computed only if some position needs them.
    """
    q, v = posterior.squared_distance_moments(samples)
    divisor = jnp.where(q > 1e-12, q, 1.0)  # divided by twice: its square would underflow in the gradient
    expected = (distance(q, alpha) * (1 - alpha * (2 - alpha) / 8 * (v / divisor / divisor))).mean(0)
    accurate = jnp.all(2 * jnp.square(q) >= MIN_EFFECTIVE_DIMENSIONS * v, axis=0)

    def with_draws(operands: tuple[Array, Posterior]) -> Array:
        drawn = fidelity_shared_draws(*operands, noise, alpha)
        return jnp.where(accurate, expected, drawn)

    return jax.lax.cond(jnp.all(accurate), lambda _: expected, with_draws, (samples, posterior))


def diversity(samples: Float[Array, "S R Z"], alpha: float = 1.0) -> Float[Array, "R"]:
    """E|x - x'|^alpha over the S(S-1)/2 pairs of different samples.

    Pairs at cyclic distance 1, 2, ... : each shift of the stack gives S pairs at once and no pair twice, except the shift by
    S/2, which meets every pair from both ends and counts half.
    """
    num_samples = samples.shape[0]
    total = jnp.zeros(samples.shape[1:-1], samples.dtype)
    for shift in range(1, num_samples // 2 + 1):
        squared = jnp.square(samples - jnp.roll(samples, shift, axis=0)).sum(-1)
        weight = 0.5 if 2 * shift == num_samples else 1.0
        total = total + weight * distance(squared, alpha).sum(0)
    return 2 * total / (num_samples * (num_samples - 1))
