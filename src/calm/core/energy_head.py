"""The energy head: one forward pass turns a hidden state and a vector of noise into a sample of the next latent."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.stack import Stack
from calm.errors import UsageError
from calm.rng import PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyHeadConfig:
    """Sizes of the energy head. Published: a block for every four layers of the backbone, noise of width 64."""

    num_blocks: int = 2
    noise_dim: int = 64
    """width E of the noise, uniform in [-1/2, 1/2]"""
    init_std: float | None = None
    """standard deviation of the kernels; none = 1 / sqrt(fan-in); the published models use 0.02"""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.noise_dim) < 1:
            raise UsageError("head: num_blocks and noise_dim must be at least 1")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "EnergyHead":
        return EnergyHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position; the hidden state's share of each block is computed once."""
        once = dense_flops(dim, dim) * (1 + self.num_blocks)
        block = 2 * dense_flops(dim, dim) + dense_flops(dim, 2 * dim) + dense_flops(dim, dim)
        end = dense_flops(dim, dim) + dense_flops(dim, latent_dim)
        return once + num_samples * (dense_flops(self.noise_dim, dim) + self.num_blocks * block + end)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def over_samples(x: Float[Array, "R D"], num_samples: int) -> Float[Array, "S R D"]:
    """Repeats `x` for every sample; the gradient adds the S slices one after the other.

    XLA's CPU reduction over a small leading axis is tens of times slower than S - 1 additions (docs/log.md).
    """
    return jnp.broadcast_to(x, (num_samples, *x.shape))


def _add_slices(num_samples: int, _: None, g: Array) -> tuple[Array]:
    total = g[0]
    for sample in range(1, num_samples):
        total = total + g[sample]
    return (total,)


over_samples.defvjp(lambda x, num_samples: (over_samples(x, num_samples), None), _add_slices)


class EnergyBlock(nnx.Module):
    """e + down(SiLU(gate) * up) with gate, up from an MLP of [LN(e); h] (CALM).

    The first linear map acts on a concatenation; here its two halves are two kernels, so that the product with the hidden
    state is made once and not S times.
    """

    def __init__(self, dim: int, *, init_std: float | None, precision: Precision, rngs: nnx.Rngs):
        # two halves of one map of fan-in 2D
        half_std = (2 * dim) ** -0.5 if init_std is None else init_std

        def dense(out_dim: int, use_bias: bool = True, std: float | None = init_std) -> Dense:
            return Dense(dim, out_dim, use_bias=use_bias, init_std=std, precision=precision, rngs=rngs)

        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.from_sample = dense(dim, use_bias=False, std=half_std)
        self.from_hidden = dense(dim, std=half_std)
        self.inner = dense(dim)
        self.gate_up = dense(2 * dim)
        self.down = dense(dim)

    def __call__(self, sample: Float[Array, "S R D"], hidden: Float[Array, "R D"]) -> Float[Array, "S R D"]:
        x = self.from_sample(self.norm(sample)) + over_samples(self.from_hidden(hidden), sample.shape[0])
        x = jax.nn.silu(self.inner(jax.nn.silu(x)))
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return sample + self.down(jax.nn.silu(gate) * up)


class EnergyHead(nnx.Module):
    """hidden, noise -> latent. Trained by the energy loss, which needs samples only (CALM).

    The last map starts at zero, so a new head gives the same latent for every noise.
    """

    def __init__(
        self,
        config: EnergyHeadConfig,
        dim: int,
        latent_dim: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = "float32",
    ):
        def dense(in_dim: int, out_dim: int, std: float | None = config.init_std) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=std, precision=precision, rngs=rngs)

        def block(rngs: nnx.Rngs) -> EnergyBlock:
            return EnergyBlock(dim, init_std=config.init_std, precision=precision, rngs=rngs)

        self.noise_dim, self.latent_dim = config.noise_dim, latent_dim
        self.embed_hidden = dense(dim, dim)
        self.norm_hidden = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.embed_noise = dense(config.noise_dim, dim)
        self.norm_noise = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.blocks = Stack(block, config.num_blocks, rngs=rngs)
        self.norm_out = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.inner_out = dense(dim, dim)
        self.out = dense(dim, latent_dim, std=0.0)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape E"]:
        """Noise for samples of leading shape `shape`."""
        return jax.random.uniform(key, (*shape, self.noise_dim), jnp.float32, -0.5, 0.5)

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b E"]) -> Float[Array, "S *b Z"]:
        """One latent for each noise vector."""
        num_samples, shape = noise.shape[0], hidden.shape[:-1]
        hidden = self.norm_hidden(self.embed_hidden(hidden.reshape(-1, hidden.shape[-1])))
        sample = self.norm_noise(self.embed_noise(noise.reshape(num_samples, -1, self.noise_dim)))
        sample, _ = self.blocks.scan(lambda block, sample, _: (block(sample, hidden), None), sample)
        latents = self.out(jax.nn.silu(self.inner_out(self.norm_out(sample))))
        return latents.reshape(num_samples, *shape, self.latent_dim)

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self(hidden, self.draw_noise(key, (num_samples, *hidden.shape[:-1])))
