"""The direction term: do predicted and true latent lie the same way from a common origin?

    loss = 1 - cos(x - o, y - o),    x a sample of the model, y the true latent, o the origin

Source: the term that J. Adam's descriptions (2025, "Hybrid CALM-on-Z", "Calm-Seal") call rectified flow, after Liu et al. 2022
(arXiv:2209.03003). It is the angle only. Rectified flow proper regresses a velocity, length included, at every time between
noise and data; that is `calm.heads.flow`. Of the angle alone follows (docs/calm-on-z.md shows both):

- the length of x - o is free: the term by itself does not place a sample, it only turns it;
- it is no proper score: of noisy samples it wants less noise, so a large weight beside the energy narrows the model's spread.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

DirectionFrom = Literal["previous", "noise"]
"""the origin: the latent of the chunk before, or the noise that the head mixed into the sample"""

MIN_LENGTH = 1e-2
"""Displacements shorter than this are treated as so long: an angle's slope is 1 / length, and so it stays finite, at most 100,
also for a sample that lies on the origin. Latents are about sqrt(Z) long."""


def direction_loss(
    samples: Float[Array, "S *b Z"], target: Float[Array, "*b Z"], origin: Float[Array, "*#s Z"]
) -> Float[Array, "*b"]:
    """1 - cos of the two displacements from `origin` (one for all samples, or one each), mean over S: in [0, 2]."""
    predicted, true = samples - origin, target - origin
    return 1 - ((predicted * true).sum(-1) / (_length(predicted) * _length(true))).mean(0)


def _length(x: Float[Array, "*b Z"]) -> Float[Array, "*b"]:
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), MIN_LENGTH**2))
