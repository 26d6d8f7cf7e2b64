"""What the encoder says of a chunk: an independent Gaussian per latent dimension."""

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

    @property
    def std(self) -> Float[Array, "*b Z"]:
        return jnp.exp(self.log_std)

    def sample(self, key: PRNGKey) -> Float[Array, "*b Z"]:
        """One reparametrised draw: mean + std * normal."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, "*b Z"]:
        """KL(posterior || N(0, I)) in nats, one value per dimension: (mean^2 + std^2 - 1 - 2 log std) / 2."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(2 * self.log_std) - 1.0 - 2.0 * self.log_std)

    def log_prob(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]:
        """Log density in nats, one value per dimension."""
        scaled = (latents - self.mean) * jnp.exp(-self.log_std)
        return -0.5 * jnp.square(scaled) - self.log_std - 0.5 * jnp.log(2 * jnp.pi)
