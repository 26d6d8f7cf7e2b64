"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-rotation layout of LLaMA."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "B N H C"], positions: Int[Array, "#B N"], theta: float = 10_000.0) -> Float[Array, "B N H C"]:
    """Turns each pair (x_i, x_{i + C/2}) by the angle position * theta^(-2i/C); angles in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
