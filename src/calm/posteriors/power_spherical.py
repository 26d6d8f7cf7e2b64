"""A distribution on a sphere around a direction: the power-spherical posterior."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, digamma, gammaln
from jaxtyping import Array, Float

from calm.core.posterior import Posteriors
from calm.rng import PRNGKey, stream

MAX_SHARPNESS = 8.0  # log of concentration / (Z - 1): std .03; far above, float32 loses the differences of log-gammas


class SphereNoise(NamedTuple):
    """Noise of the draws: directions that all positions share, and the key of each position's own radial part."""

    normal: Float[Array, "M Z"]
    key: PRNGKey


@Posteriors.register("power_spherical")
class PowerSpherical(NamedTuple):
    """Latents y = r u, |u| = 1 and r = sqrt(Z), with density proportional to (1 + direction . u)^concentration.

    Source: De Cao and Aziz 2020, arXiv:2006.04437: like von Mises-Fisher's, with normaliser, entropy and sampler in
    closed form. With w = (1 + direction . u) / 2 everything follows from w ~ Beta(a, b), b = (Z - 1) / 2 and a = b +
    concentration; at concentration 0 the distribution is uniform, which is the prior.

    The radius is sqrt(Z) because that is where N(0, I) lives: a dimension then has second moment 1, which is the scale that
    heads, stems, the noise of inspection and the threshold of an active dimension are made for. On the unit sphere a
    dimension's deviation would be 1 / sqrt(Z) and each of them would have to know.

    How we differ from the paper's sampler: it draws on the sphere around the first axis and reflects that axis onto the
    direction, which is 0/0 where the two agree. Here a normal vector n is drawn in the tangent space of the direction and
    n / sqrt(2 g), g ~ Gamma(a), is carried to the sphere by the inverse stereographic projection. |n|^2 / 2 ~ Gamma(b), so
    that w = g / (g + |n|^2 / 2) has the Beta distribution, and the gradient reaches the concentration through g.
    """

    direction: Float[Array, "*b Z"]
    """of length 1"""
    log_concentration: Float[Array, "*b 1"]

    @staticmethod
    def least_width() -> int:
        """Least latent width that the distribution is defined for."""
        return 2

    @staticmethod
    def outputs(latent_dim: int) -> int:
        """Number of values that describe one."""
        return latent_dim + 1

    @classmethod
    def of(cls, outputs: Float[Array, "*b X"]) -> "PowerSpherical":
        """From a network's outputs: a direction of any length, then log(concentration / (Z - 1)).

        In that unit the spread of a dimension depends little on Z: about sqrt(2) exp(-x / 2) for large x, and .87 at 0.
        """
        free = outputs.shape[-1] - 2
        direction = outputs[..., :-1]
        length = jnp.sqrt(jnp.square(direction).sum(-1, keepdims=True) + 1e-12)
        return cls(direction / length, jnp.log(float(free)) + jnp.minimum(outputs[..., -1:], MAX_SHARPNESS))

    @staticmethod
    def onto(latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]:
        """The point of the sphere in the same direction."""
        return latents * jax.lax.rsqrt(jnp.square(latents).mean(-1, keepdims=True) + 1e-12)

    @property
    def fills_space(self) -> bool:
        """Whether its densities are over R^Z, as those of heads are: here they are over the sphere."""
        return False

    @property
    def radius(self) -> float:
        return self.direction.shape[-1] ** 0.5

    @property
    def mean(self) -> Float[Array, "*b Z"]:
        """Mean of a draw, so inside the sphere. The mode is `radius * direction`, to which `onto` brings it."""
        b, concentration = self._b, jnp.exp(self.log_concentration)
        return self.radius * concentration / (concentration + 2 * b) * self.direction

    @property
    def std(self) -> Float[Array, "*b Z"]:
        """Deviation of a draw by dimension: radial and tangential variance in the shares that the dimension has of each."""
        along, across = self._variances()
        squares = jnp.square(self.direction)
        return self.radius * jnp.sqrt(along[..., None] * squares + across[..., None] * (1 - squares))

    def sample(self, key: PRNGKey) -> Float[Array, "*b Z"]:
        """One reparametrised draw."""
        return self.draws(key, 1)[0]

    def draws(self, key: PRNGKey, count: int) -> Float[Array, "M *b Z"]:
        """`count` independent draws."""
        normal = jax.random.normal(stream(key, "tangent"), (count, *self.direction.shape), self.direction.dtype)
        tangent = normal - (normal * self.direction).sum(-1, keepdims=True) * self.direction
        half = 0.5 * jnp.square(tangent).sum(-1, keepdims=True)
        gamma = self._gamma(stream(key, "radial"), count)[..., None]
        return self.radius * ((gamma - half) * self.direction + jnp.sqrt(2 * gamma) * tangent) / (gamma + half)

    def kl(self) -> Float[Array, "*b Z"]:
        """KL(posterior || uniform on the sphere) in nats. There is one value for a chunk and a sphere has no dimensions of its
        own, so every one gets an equal share: a clamp per dimension is Z times that clamp on the chunk.
        """
        a, b = self._a, self._b
        whole = betaln(b, b) - betaln(a, b) + (a - b) * (digamma(a) - digamma(a + b))
        return self._shares(whole)

    def log_prob(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]:
        """Log density in nats over the surface of the sphere, in equal shares of the dimensions."""
        a, b = self._a, self._b
        cosine = (latents * self.direction).sum(-1) / self.radius
        relative = (a - b) * (jnp.log1p(cosine) - jnp.log(2.0)) + betaln(b, b) - betaln(a, b)
        size = self.direction.shape[-1]
        surface = jnp.log(2.0) + 0.5 * size * jnp.log(jnp.pi) - gammaln(0.5 * size) + (size - 1) * jnp.log(self.radius)
        return self._shares(relative - surface)

    def shared_noise(self, key: PRNGKey, count: int) -> SphereNoise:
        """Noise from which `squared_distances` makes M draws at every position."""
        shape = (count, self.direction.shape[-1])
        return SphereNoise(jax.random.normal(stream(key, "tangent"), shape, self.direction.dtype), stream(key, "radial"))

    def squared_distances(self, points: Float[Array, "S R Z"], noise: SphereNoise) -> Float[Array, "S R M"]:
        """|x - y|^2 for every point x and draw y, by products of matrices, as the Gaussian's.

        |x - y|^2 = |x - r direction|^2 + 2 r ((1 - cos) x.direction - sin x.tangent), cos and sin those of the draw.
        """
        exact = jax.lax.Precision.HIGHEST
        height = (points * self.direction).sum(-1)[..., None]
        lean = jnp.einsum("rz,mz->rm", self.direction, noise.normal, precision=exact)
        cross = jnp.einsum("srz,mz->srm", points, noise.normal, precision=exact) - height * lean
        half = 0.5 * (jnp.square(noise.normal).sum(-1) - jnp.square(lean))
        gamma = jnp.moveaxis(self._gamma(noise.key, len(noise.normal)), 0, -1)
        moved = (2 * half * height - jnp.sqrt(2 * gamma) * cross) / (gamma + half)
        return jnp.square(points - self.radius * self.direction).sum(-1)[..., None] + 2 * self.radius * moved

    def squared_distance_moments(self, points: Float[Array, "S R Z"]) -> tuple[Float[Array, "S R"], Float[Array, "S R"]]:
        """Mean and variance of |x - y|^2 over draws y, for every point x; exact, since it is linear in y."""
        along, across = self._variances()
        height = (points * self.direction).sum(-1)
        sideways = jnp.square(points - height[..., None] * self.direction).sum(-1)
        short = 2 * self._b / (self._a + self._b)  # 1 - E cos
        mean = jnp.square(points - self.radius * self.direction).sum(-1) + 2 * self.radius * short * height
        return mean, 4 * self.radius**2 * (jnp.square(height) * along + sideways * across)

    @property
    def _a(self) -> Float[Array, "*b"]:
        return self._b + jnp.exp(self.log_concentration[..., 0])

    @property
    def _b(self) -> float:
        return 0.5 * (self.direction.shape[-1] - 1)

    def _variances(self) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """Variances of u, along the direction and in each dimension across it."""
        a, b = self._a, self._b
        sine = 4 * a * b / ((a + b) * (a + b + 1))  # E sin^2
        return sine / (a + b), sine / (2 * b)

    def _gamma(self, key: PRNGKey, count: int) -> Float[Array, "M *b"]:
        return jax.random.gamma(key, jnp.broadcast_to(self._a, (count, *self._a.shape)))

    def _shares(self, whole: Float[Array, "*b"]) -> Float[Array, "*b Z"]:
        size = self.direction.shape[-1]
        return jnp.broadcast_to(whole[..., None] / size, (*whole.shape, size))
