"""The shape of a cloud of latents: how many directions it uses, and how it lies around one chunk."""

import numpy as np
from jaxtyping import Float


def effective_rank(covariance: Float[np.ndarray, "Z Z"]) -> float:
    """exp of the entropy of the eigenvalues' shares: Z for a round cloud, 1 for a line (Roy and Vetterli 2007).

    The rank counts directions however little they vary; this one weighs them.
    """
    values = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    shares = values / max(values.sum(), 1e-300)
    return float(np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-300)))))


def participation_ratio(covariance: Float[np.ndarray, "Z Z"]) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: as the effective rank, with less weight on small directions."""
    return float(np.trace(covariance) ** 2 / max(float(np.sum(covariance**2)), 1e-300))


def covariance(
    total: Float[np.ndarray, "Z"], products: Float[np.ndarray, "Z Z"], count: float | int
) -> Float[np.ndarray, "Z Z"]:
    """From sums over samples of x and of x x^T."""
    mean = total / count
    return products / count - np.outer(mean, mean)
