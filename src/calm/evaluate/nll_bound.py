"""A lower bound on the log-likelihood of a model that draws a latent and then tokens given the latent.

The probability of a chunk x is an expectation over latents, p(x) = E_z p(x | z), which no formula gives. The mean over S draws
is an unbiased estimate of it, and the logarithm is concave, so

    log (1/S) sum_s p(x | z_s),   z_s ~ p(z)

lies below log p(x) in expectation, the less the larger S is. A better proposal q(z | x), such as the autoencoder's encoder,
gives

    log (1/S) sum_s p(z_s) p(x | z_s) / q(z_s | x),   z_s ~ q(z | x)

which bounds the same number, but needs the density p(z).

A decoder that was never trained to be uncertain gives a wrong token a probability near 0, and one such token makes a bound
worthless. So the decoder is smoothed: each token has (1 - e) p_decoder + e p_unigram. That is a model of its own, which draws a
token from the unigram with probability e; the bound is about it, and e belongs to the score.

Source: the bound and that it tightens with S are of Burda et al. 2016, arXiv:1509.00519. CALM (arXiv:2510.27688) gives no
likelihood at all; the smoothing is ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calm.errors import UsageError

# Shares of the unigram that are tried: evenly spaced in log(e / (1 - e)), from .0001 to .98.
SHARES = tuple(float(share) for share in 1 / (1 + np.exp(-np.linspace(np.log(1e-4), np.log(49.0), 32))))


def smoothed(
    log_probs: Float[Array, "S *b K"], unigram: Float[Array, "*b K"], share: float | Float[Array, ""]
) -> Float[Array, "S *b K"]:
    """log((1 - share) p + share u) for each token: `log_probs` and `unigram` are the logarithms of p and u, in nats."""
    return jnp.logaddexp(jnp.log1p(-share) + log_probs, jnp.log(share) + unigram)


def log_mean_exp(values: Float[Array, "S *b"]) -> Float[Array, "*b"]:
    """log of the mean of exp over the first axis, without overflow."""
    return jax.nn.logsumexp(values, axis=0) - jnp.log(values.shape[0])


def sample_sizes(num_samples: int) -> tuple[int, ...]:
    """The numbers of samples at which a bound is reported: the powers of two up to `num_samples`, and itself."""
    if num_samples < 1:
        raise UsageError(f"a likelihood bound needs at least 1 sample, got {num_samples}")
    return (*(2**i for i in range(num_samples.bit_length()) if 2**i < num_samples), num_samples)


def bound_curve(chunk_log_probs: Float[Array, "S *b"], sizes: tuple[int, ...]) -> Float[Array, "*b X"]:
    """The bound for each number of samples in `sizes`, in nats: entry i estimates E log mean of sizes[i] samples.

    For a number s the S samples are S // s groups of s, and the groups' bounds are averaged: the same samples serve every
    size, and small sizes are as well measured as large ones.
    """

    def of_size(size: int) -> Float[Array, "*b"]:
        groups = chunk_log_probs.shape[0] // size
        grouped = chunk_log_probs[: groups * size].reshape(groups, size, *chunk_log_probs.shape[1:])
        return log_mean_exp(jnp.moveaxis(grouped, 1, 0)).mean(0)

    return jnp.stack([of_size(size) for size in sizes], axis=-1)
