"""The flow head: a velocity field carries a draw of N(0, I) to a sample of the next latent."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Precision, dense_flops
from calm.core.posterior import Posterior
from calm.errors import UsageError
from calm.heads.modulated_mlp import TIMES, ModulatedMLP, stratified, whole_time
from calm.rng import PRNGKey, stream

Solver = Literal["midpoint", "euler"]
CALLS: dict[Solver, int] = {"midpoint": 2, "euler": 1}
"""how often each solver asks the network in one step"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowHeadConfig:
    """Sizes of the flow head and its solver. Published: a block for every four layers, 10 midpoint steps, 8 draws."""

    num_blocks: int = 2
    solver: Solver = "midpoint"
    num_steps: int = 10
    """steps of the solver from time 0 to 1"""
    num_draws: int = 8
    """draws of target, starting point and time at each position in the loss"""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_steps, self.num_draws) < 1:
            raise UsageError("head: num_blocks, num_steps and num_draws must be at least 1")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "FlowHead":
        return FlowHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    @property
    def evaluations(self) -> int:
        """Times that the network is asked for one sample."""
        return self.num_steps * CALLS[self.solver]

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position. The embedded times, equal everywhere, are left out."""
        shared = ModulatedMLP.condition_flops(dim, self.num_blocks)
        each = ModulatedMLP.latent_flops(dim, latent_dim, latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.evaluations * (shared + num_samples * each)

    def loss_flops(self, dim: int, latent_dim: int) -> int:
        """Forward FLOPs of the head's own loss at one position."""
        condition = ModulatedMLP.time_flops(dim) + ModulatedMLP.condition_flops(dim, self.num_blocks)
        each = ModulatedMLP.latent_flops(dim, latent_dim, latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.num_draws * (condition + each)


class FlowHead(nnx.Module):
    """hidden, noise -> latent: dx/dt = v(x, t, hidden) from x = noise at t = 0 to the latent at t = 1.

    Trained by conditional flow matching (Lipman et al. 2022, arXiv:2210.02747; rectified flow: Liu et al. 2022,
    arXiv:2209.03003): on the straight line x_t = (1 - t) x_0 + t x_1 from a normal draw to a draw of the posterior, v is
    regressed on x_1 - x_0. With the exact v the solution has the law of x_1 given the hidden state. The baseline of CALM
    (arXiv:2510.27688); we differ in that the times of one position's draws are stratified.
    """

    def __init__(self, config: FlowHeadConfig, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config, self.latent_dim, self.noise_dim = config, latent_dim, latent_dim
        self.net = ModulatedMLP(dim, latent_dim, latent_dim, config.num_blocks, precision=precision, rngs=rngs)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape Z"]:
        """Starting points for samples of leading shape `shape`."""
        return jax.random.normal(key, (*shape, self.latent_dim), jnp.float32)

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b Z"]) -> Float[Array, "S *b Z"]:
        """The end of the path that begins at each noise vector."""
        shape, flat = noise.shape, hidden.reshape(-1, hidden.shape[-1])
        condition, step = self.net.embed_hidden(flat)[None], 1.0 / self.config.num_steps

        def velocity(x: Array, time: Array) -> Array:
            return self.net(x, condition + time)

        def advance(x: Array, times: Array) -> tuple[Array, None]:
            if self.config.solver == "midpoint":
                middle = x + 0.5 * step * velocity(x, times[0])
                return x + step * velocity(middle, times[1]), None
            return x + step * velocity(x, times[0]), None

        times = np.arange(self.config.evaluations) * TIMES // self.config.evaluations
        embedded = self.net.embed_time(jnp.asarray(times.reshape(self.config.num_steps, -1), jnp.int32))
        latents, _ = jax.lax.scan(advance, noise.reshape(shape[0], -1, self.latent_dim), embedded)
        return latents.reshape(shape)

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self(hidden, self.draw_noise(key, (num_samples, *hidden.shape[:-1])))

    def loss(self, key: PRNGKey, hidden: Float[Array, "*b D"], posterior: Posterior) -> Float[Array, "*b"]:
        """Squared error of the velocity, a mean over dimensions and over `num_draws` draws of (target, start, time)."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        target = posterior.draws(stream(key, "target"), self.config.num_draws).reshape(-1, *flat.shape[:1], self.latent_dim)
        shape = target.shape
        start = self.draw_noise(stream(key, "start"), shape[:-1])
        time = stratified(jax.random.uniform(stream(key, "time"), shape[:-1]))
        x = start + time[..., None] * (target - start)
        velocity = self.net(x, self.net.embed_hidden(flat) + self.net.embed_time(whole_time(time)))
        return jnp.square(velocity - (target - start)).mean((0, -1)).reshape(hidden.shape[:-1])
