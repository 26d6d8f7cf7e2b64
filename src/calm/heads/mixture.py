"""The mixture head: a Gaussian mixture over the next latent, with a density that can be computed."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.head import Head, HeadConfig
from calm.core.mlp import ResidualSwiGLU, SwiGLU
from calm.core.posterior import Posterior
from calm.core.stack import Stack
from calm.errors import UsageError
from calm.rng import PRNGKey

MIN_STD = 1e-3


@HeadConfig.register("mixture")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureHeadConfig(HeadConfig):
    """Sizes of the mixture head."""

    has_own_loss: ClassVar[bool] = True

    num_blocks: int = 2
    """residual SwiGLU layers between the hidden state and the mixture's parameters"""
    num_components: int = 16
    """components C, each with a weight and a mean and standard deviation per dimension"""
    num_draws: int = 8
    """draws of the target at each position in the loss"""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_components, self.num_draws) < 1:
            raise UsageError("head: num_blocks, num_components and num_draws must be at least 1")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "MixtureHead":
        return MixtureHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of the products at one position. They make the mixture, from which samples are free."""
        return self.num_blocks * SwiGLU.flops(dim, 2 * dim) + dense_flops(dim, self.num_components * (2 * latent_dim + 1))

    def loss_flops(self, dim: int, latent_dim: int) -> int:
        """Forward FLOPs of the products in the head's own loss at one position."""
        return self.flops(dim, latent_dim, 1)


class Mixture(NamedTuple):
    """A Gaussian mixture with diagonal covariances for each of R rows."""

    log_weight: Float[Array, "R C"]
    mean: Float[Array, "R C Z"]
    std: Float[Array, "R C Z"]

    def log_density(self, latents: Float[Array, "S R Z"]) -> Float[Array, "S R"]:
        """log sum_c weight_c N(latent; mean_c, std_c^2), in nats."""

        def one(latents: Float[Array, "R Z"]) -> Float[Array, "R"]:
            scaled = (latents[:, None] - self.mean) / self.std
            squares = -0.5 * jnp.square(scaled).sum(-1)
            return jax.nn.logsumexp(self.log_weight + squares - jnp.log(self.std).sum(-1), axis=-1)

        constant = 0.5 * self.mean.shape[-1] * math.log(2 * math.pi)
        return jax.lax.map(one, latents) - constant  # one sample at a time: S R C Z numbers would not fit


class MixtureHead(Head):
    """hidden, noise -> latent: the noise's first number picks a component, the others place the latent in it.

    Trained by maximum likelihood of draws of the posterior. Mixtures as the output of a sequence model over latents: GIVT
    (Tschannen et al. 2023, arXiv:2312.02116). Not in CALM: the likelihood that CALM does without is exact here, over latents.
    A sample moves with the means and deviations but jumps with the weights, so a loss on samples does not train the weights.
    """

    def __init__(
        self, config: MixtureHeadConfig, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32"
    ):
        def block(rngs: nnx.Rngs) -> ResidualSwiGLU:
            return ResidualSwiGLU(dim, 2 * dim, precision=precision, rngs=rngs)

        self.config, self.latent_dim, self.noise_dim = config, latent_dim, 1 + latent_dim
        self.blocks = Stack(block, config.num_blocks, rngs=rngs)
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.out = Dense(dim, config.num_components * (2 * latent_dim + 1), use_bias=True, precision=precision, rngs=rngs)

    def mixture(self, hidden: Float[Array, "R D"]) -> Mixture:
        """The distribution of the next latent at every row."""
        x, _ = self.blocks.scan(lambda block, x, _: (block(x), None), hidden)
        values = self.out(self.norm(x)).reshape(len(hidden), self.config.num_components, -1)
        mean, width = jnp.split(values[..., 1:], 2, axis=-1)
        return Mixture(jax.nn.log_softmax(values[..., 0], axis=-1), mean, MIN_STD + jax.nn.softplus(width))

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape E"]:
        """A uniform number and Z normal ones for samples of leading shape `shape`."""
        for_component, for_place = jax.random.split(key)
        uniform = jax.random.uniform(for_component, (*shape, 1), jnp.float32)
        return jnp.concatenate([uniform, jax.random.normal(for_place, (*shape, self.latent_dim), jnp.float32)], axis=-1)

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b E"]) -> Float[Array, "S *b Z"]:
        """One latent for each noise vector."""
        mixture = self.mixture(hidden.reshape(-1, hidden.shape[-1]))
        flat = noise.reshape(noise.shape[0], -1, self.noise_dim)
        below = jnp.cumsum(jnp.exp(mixture.log_weight), axis=-1)[:, :-1]  # the last component takes what rounding leaves
        component = (flat[..., :1] >= below).sum(-1)[..., None, None]
        mean, std = (jnp.take_along_axis(x[None], component, axis=2)[:, :, 0] for x in (mixture.mean, mixture.std))
        return (mean + std * flat[..., 1:]).reshape(*noise.shape[:-1], self.latent_dim)

    def log_density(self, hidden: Float[Array, "*b D"], latents: Float[Array, "S *b Z"]) -> Float[Array, "S *b"]:
        """Log density in nats of each latent under the distribution at its position."""
        mixture = self.mixture(hidden.reshape(-1, hidden.shape[-1]))
        return mixture.log_density(latents.reshape(len(latents), -1, self.latent_dim)).reshape(latents.shape[:-1])

    def loss(self, key: PRNGKey, hidden: Float[Array, "*b D"], posterior: Posterior) -> Float[Array, "*b"]:
        """Minus the log density of draws of the posterior, in nats per dimension, a mean over `num_draws` of them."""
        return -self.log_density(hidden, posterior.draws(key, self.config.num_draws)).mean(0) / self.latent_dim
