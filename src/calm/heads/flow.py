"""The flow head: a velocity field carries a draw of N(0, I) to a sample of the next latent."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Precision, dense_flops
from calm.core.head import Head, HeadConfig
from calm.core.posterior import Posterior
from calm.errors import UsageError
from calm.heads.modulated_mlp import TIMES, ModulatedMLP, stratified, whole_time
from calm.heads.residual_mlp import ResidualMLP
from calm.rng import PRNGKey, stream

Solver = Literal["midpoint", "euler"]
CALLS: dict[Solver, int] = {"midpoint": 2, "euler": 1}
"""how often each solver asks the network in one step"""
Prediction = Literal["velocity", "clean"]
Network = Literal["modulated", "residual"]
NETWORKS: dict[Network, type[ModulatedMLP] | type[ResidualMLP]] = {"modulated": ModulatedMLP, "residual": ResidualMLP}


@HeadConfig.register("flow")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowHeadConfig(HeadConfig):
    """Sizes of the flow head and its solver. Published: a block for every four layers, 10 midpoint steps, 8 draws."""

    has_own_loss: ClassVar[bool] = True

    num_blocks: int = 2
    solver: Solver = "midpoint"
    num_steps: int = 10
    """steps of the solver from time 0 to last_time"""
    num_draws: int = 8
    """draws of target, starting point and time at each position in the loss"""
    prediction: Prediction = "velocity"
    """output of the network: the velocity, as published, or the clean latent, from which the velocity follows"""
    last_time: float = 1.0
    """time at which the solver stops; below 1, the sample is the clean latent that the network predicts there"""
    trained_until: float = 1.0
    """largest time in the loss; at least last_time"""
    start_share: float = 0.0
    """share of the loss's draws at time 0, where the network has noise alone; the others are uniform up to trained_until"""
    network: Network = "modulated"
    """how the network is told hidden state and time: by adaptive norms, as published, or added to the latent"""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_steps, self.num_draws) < 1:
            raise UsageError("head: num_blocks, num_steps and num_draws must be at least 1")
        if not 0 < self.last_time <= self.trained_until <= 1:
            raise UsageError(
                f"head: 0 < last_time <= trained_until <= 1 must hold, got last_time={self.last_time} and "
                f"trained_until={self.trained_until}"
            )
        if not 0 <= self.start_share < 1:
            raise UsageError(f"head: start_share must lie in [0, 1), got {self.start_share}")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "FlowHead":
        return FlowHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    @property
    def evaluations(self) -> int:
        """Times that the network is asked for one sample."""
        return self.num_steps * CALLS[self.solver] + self.ends_early

    @property
    def ends_early(self) -> bool:
        """Whether the last evaluation predicts the clean latent at last_time."""
        return self.last_time < 1

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position. The embedded times, equal everywhere, are left out."""
        network = NETWORKS[self.network]
        shared = network.condition_flops(dim, self.num_blocks)
        each = network.latent_flops(dim, latent_dim, latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.evaluations * (shared + num_samples * each)

    def loss_flops(self, dim: int, latent_dim: int) -> int:
        """Forward FLOPs of the head's own loss at one position."""
        network = NETWORKS[self.network]
        condition = network.time_flops(dim) + network.condition_flops(dim, self.num_blocks)
        each = network.latent_flops(dim, latent_dim, latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.num_draws * (condition + each)


class FlowHead(Head):
    """hidden, noise -> latent: dx/dt = v(x, t, hidden) from x = noise at t = 0 to the latent at t = 1.

    Trained by conditional flow matching (Lipman et al. 2022, arXiv:2210.02747; rectified flow: Liu et al. 2022,
    arXiv:2209.03003): on the straight line x_t = (1 - t) x_0 + t x_1 from a normal draw to a draw of the posterior, v is
    regressed on x_1 - x_0. With the exact v the solution has the distribution of x_1 given the hidden state. The baseline of
    CALM (arXiv:2510.27688); we differ in that the times of one position's draws are stratified.

    With `prediction` "clean" the network is regressed on x_1 itself and v = (x_1 - x) / (1 - t). The two have the same optimum
    and weigh times differently: an error of x_1 counts 1 / (1 - t)^2 as much in v. Where latents are codes of tokens, the
    token is decided early in time, so that training and solver may stop before 1 (`trained_until`, `last_time`); the sample is
    then the mean of x_1 given the path's end, which is narrower than the distribution but decodes to the same token.
    """

    def __init__(self, config: FlowHeadConfig, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config, self.latent_dim, self.noise_dim = config, latent_dim, latent_dim
        network = NETWORKS[config.network]
        self.net = network(dim, latent_dim, latent_dim, config.num_blocks, precision=precision, rngs=rngs)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape Z"]:
        """Starting points for samples of leading shape `shape`."""
        return jax.random.normal(key, (*shape, self.latent_dim), jnp.float32)

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b Z"]) -> Float[Array, "S *b Z"]:
        """The end of the path that begins at each noise vector."""
        config, shape, flat = self.config, noise.shape, hidden.reshape(-1, hidden.shape[-1])
        condition, step = self.net.embed_hidden(flat)[None], config.last_time / config.num_steps

        def velocity(x: Array, embedded: Array, time: Array) -> Array:
            said = self.net(x, condition + embedded)
            return (said - x) / (1 - time) if config.prediction == "clean" else said

        def advance(x: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            embedded, times = at
            if config.solver == "midpoint":
                middle = x + 0.5 * step * velocity(x, embedded[0], times[0])
                return x + step * velocity(middle, embedded[1], times[1]), None
            return x + step * velocity(x, embedded[0], times[0]), None

        calls = config.num_steps * CALLS[config.solver]
        whole, times = np.arange(calls) * TIMES * config.last_time // calls, np.arange(calls) * config.last_time / calls
        embedded = self.net.embed_time(jnp.asarray(whole.reshape(config.num_steps, -1), jnp.int32))
        at = embedded, jnp.asarray(times.reshape(config.num_steps, -1), jnp.float32)
        x, _ = jax.lax.scan(advance, noise.reshape(shape[0], -1, self.latent_dim), at)
        if config.ends_early:
            said = self.net(x, condition + self.net.embed_time(whole_time(jnp.float32(config.last_time))))
            x = said if config.prediction == "clean" else x + (1 - config.last_time) * said
        return x.reshape(shape)

    def loss(self, key: PRNGKey, hidden: Float[Array, "*b D"], posterior: Posterior) -> Float[Array, "*b"]:
        """Squared error of the prediction, a mean over dimensions and over `num_draws` draws of (target, start, time)."""
        config, flat = self.config, hidden.reshape(-1, hidden.shape[-1])
        target = posterior.draws(stream(key, "target"), config.num_draws).reshape(-1, *flat.shape[:1], self.latent_dim)
        shape = target.shape
        start = self.draw_noise(stream(key, "start"), shape[:-1])
        uniform = stratified(jax.random.uniform(stream(key, "time"), shape[:-1]))
        time = config.trained_until * jnp.maximum(0.0, uniform - config.start_share) / (1 - config.start_share)
        x = start + time[..., None] * (target - start)
        said = self.net(x, self.net.embed_hidden(flat) + self.net.embed_time(whole_time(time)))
        wanted = target if config.prediction == "clean" else target - start
        return jnp.square(said - wanted).mean((0, -1)).reshape(hidden.shape[:-1])
