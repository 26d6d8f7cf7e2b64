"""The autoencoder's clipped KL term."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def clipped_kl(kl: Float[Array, "*b Z"], clamp: float = 0.5) -> Float[Array, "*b"]:
    """sum_z max(clamp, KL_z) in nats: no gradient below `clamp`, so no dimension gains by collapsing onto the prior.

    Source: CALM, arXiv:2510.27688 (there lambda_KL = 0.5). The clamp is per sample and per dimension, as in the
    published code; free bits (Kingma et al. 2016) clamp a mean over the batch instead.
    """
    return jnp.maximum(kl, clamp).sum(-1)
