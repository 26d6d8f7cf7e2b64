"""The gated energy head: a prediction and Gaussian noise, mixed by a gate that is trained with them."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision, dense_flops, matmul
from calm.core.energy_head import EnergyBlock, over_samples
from calm.core.head import Head, HeadConfig
from calm.core.stack import Stack
from calm.errors import UsageError
from calm.rng import PRNGKey, stream

GateKind = Literal["scalar", "dimension", "dynamic"]

GATE_BINS = 20
GAIN = 8.0
"""Logits per unit of the learned number. Adam moves a number by its learning rate a step at most; at 3e-4 the way from .982 to
.35 would take 15,000 steps, so it takes 2,000."""


@HeadConfig.register("gated")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedEnergyHeadConfig(HeadConfig):
    """Sizes of the gated energy head."""

    mixes_noise: ClassVar[bool] = True

    num_blocks: int = 2
    """blocks of the energy head (`calm.core.energy_head`) that make the prediction"""
    gate: GateKind = "dynamic"
    """scalar: one learned number; dimension: one for each of the Z dimensions; dynamic: a function of the hidden state, for
    each dimension"""
    gate_logit: float = 4.0
    """the gate starts at the sigmoid of this everywhere: .982"""
    noise_std: float = 1.0
    """standard deviation of the noise, the largest that can be reached: it must exceed the latents' own spread (`calm inspect
    autoencoder`: aggregate std). Below it the gate closes, and nothing is predicted any more"""
    noise_dim: int = 0
    """width of a second noise, uniform in [-1/2, 1/2], that the prediction reads; 0 = it reads the hidden state alone, and the
    distribution of a latent is a Gaussian whose standard deviation is (1 - gate) noise_std"""
    init_std: float | None = None
    """standard deviation of the kernels; none = 1 / sqrt(fan-in)"""

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.noise_dim < 0:
            raise UsageError("head: num_blocks must be at least 1, and noise_dim at least 0")
        if not 0 < self.noise_std < float("inf"):
            raise UsageError(f"head: noise_std must be above 0 and finite, got {self.noise_std}")
        if not abs(self.gate_logit) <= 10:  # beyond, the sigmoid's slope is below 5e-5: the gate would stay where it is
            raise UsageError(f"head: gate_logit must lie in -10 .. 10, got {self.gate_logit}")

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "GatedEnergyHead":
        return GatedEnergyHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position. What does not read noise is computed once."""
        once = dense_flops(dim, dim) * (1 + self.num_blocks)
        once += dense_flops(dim, latent_dim) if self.gate == "dynamic" else 0
        block = 2 * dense_flops(dim, dim) + dense_flops(dim, 2 * dim) + dense_flops(dim, dim)
        prediction = self.num_blocks * block + dense_flops(dim, dim) + dense_flops(dim, latent_dim)
        if self.noise_dim:
            return once + num_samples * (dense_flops(self.noise_dim, dim) + prediction)
        return once + prediction


class Gate(nnx.Module):
    """hidden -> g in (0, 1): sigmoid of a learned number, of one for each dimension, or of a linear map that starts at 0."""

    def __init__(self, config: GatedEnergyHeadConfig, dim: int, latent_dim: int, *, precision: Precision):
        dynamic, width = config.gate == "dynamic", 1 if config.gate == "scalar" else latent_dim
        self.bias = nnx.Param(jnp.full((width,), config.gate_logit / GAIN, jnp.float32))
        self.kernel = nnx.Param(jnp.zeros((dim, latent_dim), jnp.float32)) if dynamic else None
        self.precision = precision

    def __call__(self, hidden: Float[Array, "R D"]) -> Float[Array, "#R #Z"]:
        logits = GAIN * self.bias[...][None]
        if self.kernel is not None:
            logits = logits + matmul(hidden, self.kernel[...], self.precision)
        return jax.nn.sigmoid(logits)


class GatedEnergyHead(Head):
    """hidden, noise -> latent = g * delta + (1 - g) * noise, noise of N(0, noise_std^2 I) (J. Adam 2025, "Hybrid CALM-on-Z").

    Trained by the energy loss, which sees only samples, so the gate finds its own value: where delta reads the hidden state
    alone and noise_std is 1, a latent is drawn from N(g delta, (1 - g)^2 I), and the score, being strictly proper, is least
    where 1 - g is the standard deviation of the truth (docs/calm-on-z.md). A gate near 1 says that the next latent is known,
    one near 0 that it is not: or that the noise is too narrow, for g cannot be negative.

    The description leaves open what delta reads. Here, by default, the hidden state, since "g near 1 is deterministic" would
    not hold otherwise; the price is one mode. With `noise_dim` it reads a noise of its own and reaches any distribution.
    The network of delta is the energy head's, and its last map starts at zero too.
    """

    def __init__(
        self, config: GatedEnergyHeadConfig, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32"
    ):
        def dense(in_dim: int, out_dim: int, std: float | None = config.init_std) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=std, precision=precision, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)

        def block(rngs: nnx.Rngs) -> EnergyBlock:
            return EnergyBlock(dim, init_std=config.init_std, precision=precision, rngs=rngs)

        self.config, self.latent_dim, self.noise_dim = config, latent_dim, latent_dim + config.noise_dim
        self.embed_hidden, self.norm_hidden = dense(dim, dim), norm()
        self.embed_noise = dense(config.noise_dim, dim) if config.noise_dim else None
        self.norm_noise = norm() if config.noise_dim else None
        self.blocks = Stack(block, config.num_blocks, rngs=rngs)
        self.norm_out, self.inner_out = norm(), dense(dim, dim)
        self.out = dense(dim, latent_dim, 0.0)
        self.gate = Gate(config, dim, latent_dim, precision=precision)

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape E"]:
        """Z normal numbers for samples of leading shape `shape`, and after them the uniform ones that delta reads."""
        normal = jax.random.normal(stream(key, "latent"), (*shape, self.latent_dim), jnp.float32)
        if not self.config.noise_dim:
            return normal
        uniform = jax.random.uniform(stream(key, "delta"), (*shape, self.config.noise_dim), jnp.float32, -0.5, 0.5)
        return jnp.concatenate([normal, uniform], axis=-1)

    def latent_noise(self, noise: Float[Array, "*b E"]) -> Float[Array, "*b Z"]:
        """The part of the noise that the gate mixes in: where a sample would lie at g = 0."""
        return self.config.noise_std * noise[..., : self.latent_dim]

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b E"]) -> Float[Array, "S *b Z"]:
        """One latent for each noise vector."""
        flat, noise_rows = hidden.reshape(-1, hidden.shape[-1]), noise.reshape(len(noise), -1, self.noise_dim)
        delta, gate = self._delta(flat, noise_rows[..., self.latent_dim :]), self.gate(flat)
        latents = gate * delta + (1 - gate) * self.latent_noise(noise_rows)
        return latents.reshape(*noise.shape[:-1], self.latent_dim)

    def _delta(self, hidden: Float[Array, "R D"], uniform: Float[Array, "S R e"]) -> Float[Array, "S R Z"]:
        """The prediction, broadcast over samples where it reads no noise."""
        hidden = self.norm_hidden(self.embed_hidden(hidden))
        x = hidden[None]  # without noise there is one stream, and it starts as what the noise would be read beside
        if self.embed_noise is not None and self.norm_noise is not None:
            x = self.norm_noise(self.embed_noise(uniform))
        x, _ = self.blocks.scan(lambda block, x, _: (block(x, hidden), None), x)
        delta = self.out(jax.nn.silu(self.inner_out(self.norm_out(x))))
        return over_samples(delta[0], len(uniform)) if self.embed_noise is None else delta

    def gates(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b Z"]:
        """The gate at every position and dimension."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return jnp.broadcast_to(self.gate(flat), (len(flat), self.latent_dim)).reshape(*hidden.shape[:-1], self.latent_dim)

    def measures(self, hidden: Float[Array, "B N D"]) -> dict[str, Array]:
        """The gate's mean, and the shares of its values in equal parts of [0, 1], over positions and dimensions."""
        gates = jax.lax.stop_gradient(self.gates(hidden))
        place = jnp.clip(gates * GATE_BINS, 0, GATE_BINS - 1).astype(jnp.int32)
        counts = jnp.zeros((GATE_BINS,), jnp.float32).at[place.reshape(-1)].add(1.0)
        return {"gate_mean": gates.mean(), "gate_histogram": counts / gates.size}
