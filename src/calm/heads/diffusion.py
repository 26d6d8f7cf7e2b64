"""The diffusion head: noise is taken out of a draw of N(0, I) step by step, until it is a sample of the next latent."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Precision, dense_flops
from calm.core.posterior import Posterior
from calm.errors import UsageError
from calm.heads.modulated_mlp import TIMES, ModulatedMLP, stratified, whole_time
from calm.rng import PRNGKey, stream

Prediction = Literal["velocity", "noise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionHeadConfig:
    """Sizes of the diffusion head. Published: a block for every four layers, 100 of 1000 steps when sampling, 8 draws."""

    num_blocks: int = 2
    num_steps: int = 100
    """steps in sampling, evenly spaced among the 1000 of training"""
    num_draws: int = 8
    """draws of target, noise and step at each position in the loss"""
    prediction: Prediction = "velocity"
    """what the network says of a noisy latent; the published models say its noise, which takes long training: see the head"""

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.num_draws) < 1:
            raise UsageError("head: num_blocks and num_draws must be at least 1")
        if not 2 <= self.num_steps <= TIMES:
            raise UsageError(f"head: num_steps must lie in 2 .. {TIMES}, got {self.num_steps}")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "DiffusionHead":
        return DiffusionHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position. The embedded times, equal everywhere, are left out."""
        shared = ModulatedMLP.condition_flops(dim, self.num_blocks)
        each = ModulatedMLP.latent_flops(dim, latent_dim, 2 * latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.num_steps * (shared + num_samples * each)

    def loss_flops(self, dim: int, latent_dim: int) -> int:
        """Forward FLOPs of the head's own loss at one position."""
        condition = ModulatedMLP.time_flops(dim) + ModulatedMLP.condition_flops(dim, self.num_blocks)
        each = ModulatedMLP.latent_flops(dim, latent_dim, 2 * latent_dim, self.num_blocks)
        return dense_flops(dim, dim) + self.num_draws * (condition + each)


class Schedule(NamedTuple):
    """The noise process at n of its 1000 steps; every array is `[n]`, from the least noise to the most, or some of its rows.

    x_t = signal x_0 + noise eps. Given x_t and x_0, the latent one step nearer to x_0 is Gaussian, with mean
    `of_clean` x_0 + `of_noisy` x_t and a log-variance of `low`; that of the step without knowing x_0 lies between `low` and
    `high` (Nichol and Dhariwal 2021, arXiv:2102.09672).
    """

    times: Int[Array, "*n"]
    signal: Float[Array, "*n"]
    noise: Float[Array, "*n"]
    of_clean: Float[Array, "*n"]
    of_noisy: Float[Array, "*n"]
    low: Float[Array, "*n"]
    high: Float[Array, "*n"]

    def at(self, index: Int[Array, "*t"]) -> "Schedule":
        """The rows of these indices, on the device, with an axis for the latent's dimensions."""
        return Schedule(*(values[index][..., None] for values in self))


def schedule(num_steps: int = TIMES) -> Schedule:
    """The squared-cosine schedule over 1000 steps (arXiv:2102.09672), or `num_steps` of them at even distances."""
    return Schedule(*map(jnp.asarray, _schedule(num_steps)))


@functools.cache
def _schedule(num_steps: int) -> tuple[np.ndarray, ...]:
    def remaining(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - remaining((t + 1) / TIMES) / remaining(t / TIMES), 0.999) for t in range(TIMES)]
    times = np.round(np.arange(num_steps) * (TIMES - 1) / max(num_steps - 1, 1)).astype(np.int32)
    kept = np.cumprod(1 - np.array(betas))[times]
    before = np.append(1.0, kept[:-1])
    beta = 1 - kept / before
    variance = beta * (1 - before) / (1 - kept)
    low = np.log(np.append(variance[1], variance[1:]))  # the first is 0: its logarithm is that of the second
    of_clean, of_noisy = beta * np.sqrt(before) / (1 - kept), (1 - before) * np.sqrt(kept / before) / (1 - kept)
    floats = (np.sqrt(kept), np.sqrt(1 - kept), of_clean, of_noisy, low, np.log(beta))
    return times, *(values.astype(np.float32) for values in floats)


class DiffusionHead(nnx.Module):
    """hidden, noise -> latent by denoising diffusion (Ho et al. 2020, arXiv:2006.11239), a baseline of CALM.

    Of x_t = signal x_0 + noise eps the network predicts the velocity, signal eps - noise x_0 (Salimans and Ho 2022,
    arXiv:2202.00512), or the noise eps, and, between two bounds, the log-variance of the step towards x_{t-1}. The loss is
    the squared error of the prediction, plus the variational bound as a function of that variance alone (arXiv:2102.09672).
    Sampling is ancestral, over evenly spaced steps.

    How we differ from the published code: it predicts the noise. At the first step of sampling signal is 5e-5, and what the
    network gets wrong there is multiplied by hundreds, so after short training samples land far from every latent
    (docs/heads.md). It scores the last step by a likelihood over 256 shades of grey, made for images; here it is the density
    of a Gaussian. The steps of one position's draws are stratified.
    """

    def __init__(
        self, config: DiffusionHeadConfig, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32"
    ):
        self.config, self.latent_dim, self.noise_dim = config, latent_dim, config.num_steps * latent_dim
        self.net = ModulatedMLP(dim, latent_dim, 2 * latent_dim, config.num_blocks, precision=precision, rngs=rngs)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape E"]:
        """The starting point and the noise of every step but the last, for samples of leading shape `shape`."""
        return jax.random.normal(key, (*shape, self.noise_dim), jnp.float32)

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b E"]) -> Float[Array, "S *b Z"]:
        """The end of the chain that each noise vector drives."""
        shape, steps = noise.shape, schedule(self.config.num_steps)
        condition = self.net.embed_hidden(hidden.reshape(-1, hidden.shape[-1]))[None]
        noise = noise.reshape(shape[0], -1, self.config.num_steps, self.latent_dim)
        embedded = self.net.embed_time(steps.times)

        def advance(x: Array, index: Array) -> tuple[Array, None]:
            mean, log_variance = self._step(x, self.net(x, condition + embedded[index]), steps.at(index))
            drawn = jax.lax.dynamic_index_in_dim(noise, self.config.num_steps - index, axis=2, keepdims=False)
            return jnp.where(index > 0, mean + jnp.exp(0.5 * log_variance) * drawn, mean), None

        latents, _ = jax.lax.scan(advance, noise[:, :, 0], jnp.arange(self.config.num_steps - 1, -1, -1))
        return latents.reshape(*shape[:-1], self.latent_dim)

    def _step(self, x: Array, predicted: Array, at: Schedule) -> tuple[Array, Array]:
        """Mean and log-variance of the step from x_t towards x_{t-1}."""
        guess, share = jnp.split(predicted, 2, axis=-1)
        clean = at.signal * x - at.noise * guess if self.config.prediction == "velocity" else (x - at.noise * guess) / at.signal
        share = 0.5 * (share + 1)  # the network's [-1, 1] spans [low, high]
        return at.of_clean * clean + at.of_noisy * x, share * at.high + (1 - share) * at.low

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self(hidden, self.draw_noise(key, (num_samples, *hidden.shape[:-1])))

    def loss(self, key: PRNGKey, hidden: Float[Array, "*b D"], posterior: Posterior) -> Float[Array, "*b"]:
        """Squared error of the prediction, plus the bound on the step in bits; means over dimensions and `num_draws` draws."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        target = posterior.draws(stream(key, "target"), self.config.num_draws).reshape(-1, *flat.shape[:1], self.latent_dim)
        shape = target.shape
        noise = jax.random.normal(stream(key, "noise"), shape)
        time = whole_time(stratified(jax.random.uniform(stream(key, "time"), shape[:-1])))
        at = schedule().at(time)
        x = at.signal * target + at.noise * noise
        predicted = self.net(x, self.net.embed_hidden(flat) + self.net.embed_time(time))
        guess, share = jnp.split(predicted, 2, axis=-1)
        true_guess = at.signal * noise - at.noise * target if self.config.prediction == "velocity" else noise
        error = jnp.square(guess - true_guess)

        # the bound trains the variance only
        step_mean, log_variance = self._step(x, jnp.concatenate([jax.lax.stop_gradient(guess), share], axis=-1), at)
        true_mean = at.of_clean * target + at.of_noisy * x
        gap = jnp.square(true_mean - step_mean) * jnp.exp(-log_variance)
        divergence = 0.5 * (log_variance - at.low - 1 + jnp.exp(at.low - log_variance) + gap)
        last = 0.5 * (jnp.square(target - step_mean) * jnp.exp(-log_variance) + log_variance + math.log(2 * math.pi))
        bound = jnp.where(time[..., None] == 0, last, divergence) / math.log(2)
        return (error + bound).mean((0, -1)).reshape(hidden.shape[:-1])
