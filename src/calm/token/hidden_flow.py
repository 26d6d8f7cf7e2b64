"""A rectified flow to the next hidden state, told this one: a regulariser of what the backbone's states say of each other."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Precision, dense_flops
from calm.heads.modulated_mlp import ModulatedMLP, whole_time
from calm.heads.rectified_flow import on_the_line, rectified_flow_loss, white_velocity
from calm.rng import PRNGKey, stream

FlowGradient = Literal["condition", "both"]
BLOCKS = 1


class HiddenFlow(nnx.Module):
    """|v(x_t, t | h_n) - (x_1 - x_0)|^2 with x_1 = h_{n+1} / rms(h_{n+1}), x_0 ~ N(0, I) and t uniform, a mean over D.

    v is the best velocity between two white ends (`white_velocity`) plus a network that begins at zero, so the loss begins near
    pi / 2, and 2 / pi times it reads as how uncertain the next state is, given this one, on a scale of 0 to 1. The end is
    divided by its root mean square: the size of the states, which the logits own, gains nothing here.

    gradient "condition": the end is a constant. h_n alone learns, to say more about the state after it: what a second,
    continuous next-step prediction does, whose target cannot give in.
    gradient "both": h_{n+1} learns too, to be what v expects. The least of that is a constant state
    (`calm.heads.rectified_flow`): this form pulls states together, and it is here because that is how the regulariser is
    often described.
    """

    def __init__(self, dim: int, *, precision: Precision = "float32", rngs: nnx.Rngs):
        self.net = ModulatedMLP(dim, dim, dim, BLOCKS, precision=precision, rngs=rngs)

    def loss(self, key: PRNGKey, hidden: Float[Array, "B N D"], *, gradient: FlowGradient) -> Float[Array, "B M"]:
        """The loss of every position but the first, M = N - 1, by one draw of noise and time."""
        condition, end = hidden[:, :-1], hidden[:, 1:]
        if gradient == "condition":
            end = jax.lax.stop_gradient(end)
        end = end * jax.lax.rsqrt(jnp.square(end).mean(-1, keepdims=True) + 1e-6)
        start = jax.random.normal(stream(key, "start"), end.shape)
        time = jax.random.uniform(stream(key, "time"), end.shape[:-1])
        x = on_the_line(start, end, time)
        return rectified_flow_loss(self.velocity(x, time, condition), start, end)

    def velocity(
        self, x: Float[Array, "B M D"], time: Float[Array, "B M"], condition: Float[Array, "B M D"]
    ) -> Float[Array, "B M D"]:
        dim = x.shape[-1]
        told = self.net.embed_hidden(condition) + self.net.embed_time(whole_time(time))
        learned = self.net(x.reshape(1, -1, dim), told.reshape(1, -1, dim)).reshape(x.shape)
        return white_velocity(x, time) + learned

    @staticmethod
    def flops(dim: int) -> int:
        """Forward FLOPs of one position."""
        condition = dense_flops(dim, dim) + ModulatedMLP.time_flops(dim) + ModulatedMLP.condition_flops(dim, BLOCKS)
        return condition + ModulatedMLP.latent_flops(dim, dim, dim, BLOCKS)
