"""Reconstruction by the autoencoder: tokens and whole chunks right, also under noise, and the statistics of its
latents.

A language model over latents never hits a latent exactly, so accuracy under noise matters as much as accuracy. Noise
is given in the latent's own units (`sigma`; CALM reports > 99.9 % at about 0.3, the standard deviation that its
posterior settles at) or relative to each dimension's aggregate standard deviation, which does not change when latents
are rescaled.

Source: CALM, arXiv:2510.27688, autoencoder section; active dimensions: Burda et al. 2016, arXiv:1509.00519.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.core.intervals import Mean
from calm.rng import PRNGKey


class Reconstruction(NamedTuple):
    """Sums over chunks: `tokens.value` and `chunks.value` are the shares of tokens and of whole chunks that are
    right.
    """

    tokens: Mean
    chunks: Mean

    def __add__(self, other: "Reconstruction") -> "Reconstruction":  # type: ignore[override]
        return Reconstruction(self.tokens + other.tokens, self.chunks + other.chunks)


def reconstruction(
    predicted: Int[Array, "*b N K"], tokens: Int[Array, "*b N K"], weights: Float[Array, "*b"] | None = None
) -> Reconstruction:
    """Right tokens and right chunks, summed over chunks: one sum for each leading row `*b`, times its weight if
    given.
    """
    right = predicted == tokens
    num_chunks, chunk_size = tokens.shape[-2:]
    weights = jnp.ones(tokens.shape[:-2]) if weights is None else weights
    return Reconstruction(
        Mean(right.sum((-2, -1)) * weights, num_chunks * chunk_size * weights),
        Mean(right.all(-1).sum(-1) * weights, num_chunks * weights),
    )


def with_noise(
    latents: Float[Array, "*b Z"], key: PRNGKey, sigma: float, scale: Float[Array, "Z"] | None = None
) -> Float[Array, "*b Z"]:
    """latents + sigma * scale * standard normal. `scale` None: sigma in latent units; the aggregate standard
    deviation: relative.
    """
    noise = jax.random.normal(key, latents.shape, latents.dtype) * sigma
    return latents + (noise if scale is None else noise * scale)


class LatentMoments(NamedTuple):
    """Sums over chunks from which the aggregate posterior's spread, dimension by dimension, follows. Float32 sums:
    keep each part below about a million chunks and add parts in float64 on the host."""

    mean: Float[Array, "Z"]
    mean_squared: Float[Array, "Z"]
    variance: Float[Array, "Z"]
    std: Float[Array, "Z"]
    kl: Float[Array, "Z"]
    count: Float[Array, ""]

    def __add__(self, other: "LatentMoments") -> "LatentMoments":  # type: ignore[override]
        return LatentMoments(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def variance_of_means(self):
        """Var over chunks of the posterior mean, `[Z]`."""
        return self.mean_squared / self.count - (self.mean / self.count) ** 2

    @property
    def aggregate_std(self):
        """Standard deviation of the aggregate posterior, `[Z]`: variance of the means plus mean of the variances."""
        return (jnp.maximum(self.variance_of_means, 0) + self.variance / self.count) ** 0.5

    @property
    def posterior_std(self):
        """Mean posterior standard deviation (sigma), `[Z]`."""
        return self.std / self.count

    @property
    def active_dimensions(self) -> int:
        """Dimensions whose posterior mean varies over the data (variance above 0.01); the others have collapsed."""
        return int((self.variance_of_means > 0.01).sum())


def latent_moments(
    mean: Float[Array, "*b Z"], std: Float[Array, "*b Z"], kl: Float[Array, "*b Z"], weights: Float[Array, "*b"]
) -> LatentMoments:
    """Weighted sums over the leading axes; weight 0 leaves a chunk out."""

    def weighted(value):
        return jnp.einsum("rz,r->z", value.reshape(-1, value.shape[-1]), weights.reshape(-1))

    return LatentMoments(weighted(mean), weighted(mean**2), weighted(std**2), weighted(std), weighted(kl), weights.sum())
