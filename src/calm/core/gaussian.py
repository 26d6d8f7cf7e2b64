"""An independent Gaussian per latent dimension: the posterior of CALM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.rng import PRNGKey


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents.

    `log_std` is the logarithm of the standard deviation, not of the variance (CALM, arXiv:2510.27688).
    """

    mean: Float[Array, "*b Z"]
    log_std: Float[Array, "*b Z"]

    @staticmethod
    def outputs(latent_dim: int) -> int:
        """How many numbers describe one."""
        return 2 * latent_dim

    @classmethod
    def of(cls, outputs: Float[Array, "*b X"]) -> "Gaussian":
        """From a network's outputs: means, then log_stds."""
        return cls(*jnp.split(outputs, 2, axis=-1))

    @staticmethod
    def onto(latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]:
        """Every vector may be a latent."""
        return latents

    @property
    def fills_space(self) -> bool:
        """Whether its densities are over R^Z, as those of heads are."""
        return True

    @property
    def std(self) -> Float[Array, "*b Z"]:
        return jnp.exp(self.log_std)

    def sample(self, key: PRNGKey) -> Float[Array, "*b Z"]:
        """One reparametrised draw: mean + std * normal."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def draws(self, key: PRNGKey, count: int) -> Float[Array, "M *b Z"]:
        """`count` independent draws."""
        return self.mean + self.std * jax.random.normal(key, (count, *self.mean.shape), self.mean.dtype)

    def kl(self) -> Float[Array, "*b Z"]:
        """KL(posterior || N(0, I)) in nats, one value per dimension: (mean^2 + std^2 - 1 - 2 log std) / 2."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(2 * self.log_std) - 1.0 - 2.0 * self.log_std)

    def log_prob(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]:
        """Log density in nats, one value per dimension."""
        scaled = (latents - self.mean) * jnp.exp(-self.log_std)
        return -0.5 * jnp.square(scaled) - self.log_std - 0.5 * jnp.log(2 * jnp.pi)

    def shared_noise(self, key: PRNGKey, count: int) -> Float[Array, "M Z"]:
        """What `squared_distances` makes M draws of at every position: standard normals."""
        return jax.random.normal(key, (count, self.mean.shape[-1]), self.mean.dtype)

    def squared_distances(self, points: Float[Array, "S R Z"], noise: Float[Array, "M Z"]) -> Float[Array, "S R M"]:
        """|x - mean - std * eps|^2 for every point x and draw, by |d|^2 - 2 (d*std).eps + std^2.eps^2 with d = x - mean."""
        offset = points - self.mean
        exact = jax.lax.Precision.HIGHEST  # the squares cancel to the distance: keep float32 products
        cross = jnp.einsum("srz,mz->srm", offset * self.std, noise, precision=exact)
        own = jnp.einsum("rz,mz->rm", jnp.square(self.std), jnp.square(noise), precision=exact)
        return jnp.square(offset).sum(-1)[..., None] - 2 * cross + own

    def squared_distance_moments(self, points: Float[Array, "S R Z"]) -> tuple[Float[Array, "S R"], Float[Array, "S R"]]:
        """Mean and variance of |x - y|^2 over draws y, for every point x."""
        variance = jnp.square(self.std)
        squares = jnp.square(points - self.mean)
        mean = squares.sum(-1) + variance.sum(-1)
        return mean, 4 * (squares * variance).sum(-1) + 2 * jnp.square(variance).sum(-1)
