"""The network of the heads that sample in many steps: a residual MLP told the time and the hidden state by adaptive norms.

A condition, the sum of what the hidden state and the time are mapped to, gives every block a shift and a scale for its
normalised input and a gate for its output (adaptive LayerNorm: Peebles and Xie 2022, arXiv:2212.09748). As a head on an
autoregressive model: Li et al. 2024, arXiv:2406.11838; CALM's flow and diffusion heads are this network.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.stack import Stack

TIMES = 1000
"""times are whole numbers 0 .. TIMES - 1, as in the published models: a continuous time in [0, 1) is rounded down"""
FREQUENCIES = 128
_LONGEST_PERIOD = 10_000.0


def time_waves(time: Int[Array, "*t"]) -> Float[Array, "*t W"]:
    """Cosines, then sines, of the time at 128 frequencies from 1 down to almost 1 / 10000 (W = 256)."""
    frequencies = jnp.exp(-math.log(_LONGEST_PERIOD) * jnp.arange(FREQUENCIES, dtype=jnp.float32) / FREQUENCIES)
    angles = time[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def stratified(uniform: Float[Array, "M R"]) -> Float[Array, "M R"]:
    """M numbers in [0, 1) for each of R rows, one from every M-th of the interval.

    Each part of the interval is met exactly once, so a mean over the M has the same expectation as with independent numbers
    and less variance.
    """
    num_draws = uniform.shape[0]
    return (jnp.arange(num_draws, dtype=uniform.dtype)[:, None] + uniform) / num_draws


def whole_time(time: Float[Array, "*t"]) -> Int[Array, "*t"]:
    """A time in [0, 1) as one of the TIMES whole numbers."""
    return jnp.clip((time * TIMES).astype(jnp.int32), 0, TIMES - 1)


def _modulate(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


class ModulatedBlock(nnx.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), with shift, scale and gate a linear map of SiLU(condition)."""

    def __init__(self, dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.inner = Dense(dim, dim, use_bias=True, precision=precision, rngs=rngs)
        self.outer = Dense(dim, dim, use_bias=True, precision=precision, rngs=rngs)
        self.modulation = Dense(dim, 3 * dim, use_bias=True, init_std=0.0, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "S R D"], condition: Float[Array, "C R D"]) -> Float[Array, "S R D"]:
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(condition)), 3, axis=-1)
        y = _modulate(self.norm(x), shift, scale)
        return x + gate * self.outer(jax.nn.silu(self.inner(y)))


class ModulatedMLP(nnx.Module):
    """(latent, hidden state, time) -> `out_dim` numbers, such as a velocity or the noise in a latent.

    Samples that share hidden state and time share the condition: pass it with a leading axis of 1, and the modulations, two
    fifths of a block's products, are computed once for all S of them. Modulations and the last map start at zero, so a new
    network is zero everywhere.
    """

    def __init__(
        self, dim: int, latent_dim: int, out_dim: int, num_blocks: int, *, precision: Precision = "float32", rngs: nnx.Rngs
    ):
        def dense(in_dim: int, out_dim: int, std: float | None = None) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=std, precision=precision, rngs=rngs)

        self.embed_latent = dense(latent_dim, dim)
        self.embed_hidden = dense(dim, dim)
        self.time_inner = dense(2 * FREQUENCIES, dim)
        self.time_outer = dense(dim, dim)
        self.blocks = Stack(lambda rngs: ModulatedBlock(dim, precision=precision, rngs=rngs), num_blocks, rngs=rngs)
        self.norm_out = nnx.LayerNorm(dim, epsilon=1e-6, use_bias=False, use_scale=False, rngs=rngs)
        self.modulation_out = dense(dim, 2 * dim, std=0.0)
        self.out = dense(dim, out_dim, std=0.0)

    def embed_time(self, time: Int[Array, "*t"]) -> Float[Array, "*t D"]:
        """The time's part of a condition."""
        return self.time_outer(jax.nn.silu(self.time_inner(time_waves(time))))

    def __call__(self, latents: Float[Array, "S R Z"], condition: Float[Array, "C R D"]) -> Float[Array, "S R O"]:
        """`condition` is `embed_hidden(hidden) + embed_time(time)`; C is 1 or S."""
        x, _ = self.blocks.scan(lambda block, x, _: (block(x, condition), None), self.embed_latent(latents))
        shift, scale = jnp.split(self.modulation_out(jax.nn.silu(condition)), 2, axis=-1)
        return self.out(_modulate(self.norm_out(x), shift, scale))

    @staticmethod
    def condition_flops(dim: int, num_blocks: int) -> int:
        """Forward FLOPs of the modulations for one condition."""
        return num_blocks * dense_flops(dim, 3 * dim) + dense_flops(dim, 2 * dim)

    @staticmethod
    def latent_flops(dim: int, latent_dim: int, out_dim: int, num_blocks: int) -> int:
        """Forward FLOPs for one latent, the condition's share apart."""
        return dense_flops(latent_dim, dim) + num_blocks * 2 * dense_flops(dim, dim) + dense_flops(dim, out_dim)

    @staticmethod
    def time_flops(dim: int) -> int:
        """Forward FLOPs of embedding one time."""
        return dense_flops(2 * FREQUENCIES, dim) + dense_flops(dim, dim)
