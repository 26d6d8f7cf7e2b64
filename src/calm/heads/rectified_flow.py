"""Rectified flow between two ends: the squared error of a velocity on the straight line from one to the other.

Liu et al. 2022, arXiv:2209.03003. On x_t = (1 - t) x_0 + t x_1 a network v(x_t, t) is regressed on x_1 - x_0. The best v is the
mean of x_1 - x_0 given x_t (and whatever v is told besides); what is left is how little of the end the line's point says.

How small the loss can be says what its gradient does to the end x_1, if it may reach it. For noise x_0 ~ N(0, 1) and an end
that is N(mu, s^2) given what v is told, the least loss at time t is s^2 / ((1 - t)^2 + t^2 s^2), and over all t

    s * pi / 2,

which falls to 0 with s. So a loss that moves its own target makes the target predictable from what v is told; alone, it is
least when the target is constant.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def on_the_line(start: Float[Array, "*b D"], end: Float[Array, "*b D"], time: Float[Array, "*b"]) -> Float[Array, "*b D"]:
    """x_t = (1 - t) x_0 + t x_1."""
    return start + time[..., None] * (end - start)


def rectified_flow_loss(
    velocity: Float[Array, "*b D"], start: Float[Array, "*b D"], end: Float[Array, "*b D"]
) -> Float[Array, "*b"]:
    """|v - (x_1 - x_0)|^2 at every position, a mean over D."""
    return jnp.square(velocity - (end - start)).mean(-1)


def white_velocity(x: Float[Array, "*b D"], time: Float[Array, "*b"]) -> Float[Array, "*b D"]:
    """The best velocity where both ends are N(0, I): (2t - 1) / ((1 - t)^2 + t^2) * x_t. Its loss is pi / 2."""
    gain = (2 * time - 1) / ((1 - time) ** 2 + time**2)
    return gain[..., None] * x
