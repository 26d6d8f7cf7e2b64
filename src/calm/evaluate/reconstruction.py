"""Reconstruction by the autoencoder: tokens and whole chunks right, also under noise, and the statistics of its
latents.

A language model over latents never hits a latent exactly, so accuracy under noise matters as much as accuracy. Noise
is given in the latent's own units (`sigma`; CALM reports > 99.9 % at about 0.3, the standard deviation that its
posterior settles at) or relative to each dimension's aggregate standard deviation, which does not change when latents
are rescaled.

Source: CALM, arXiv:2510.27688, autoencoder section; active dimensions: Burda et al. 2016, arXiv:1509.00519.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import Interval, Mean, bootstrap
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, stream


class Reconstruction(NamedTuple):
    """Sums over chunks: `tokens.value` and `chunks.value` are the shares of tokens and of whole chunks that are
    right.
    """

    tokens: Mean
    chunks: Mean

    def __add__(self, other: "Reconstruction") -> "Reconstruction":  # type: ignore[override]
        return Reconstruction(self.tokens + other.tokens, self.chunks + other.chunks)


def reconstruction(
    predicted: Int[Array, "*b N K"], tokens: Int[Array, "*b N K"], weights: Float[Array, "*b"] | None = None
) -> Reconstruction:
    """Right tokens and right chunks, summed over chunks: one sum for each leading row `*b`, times its weight if
    given.
    """
    right = predicted == tokens
    num_chunks, chunk_size = tokens.shape[-2:]
    weights = jnp.ones(tokens.shape[:-2]) if weights is None else weights
    return Reconstruction(
        Mean(right.sum((-2, -1)) * weights, num_chunks * chunk_size * weights),
        Mean(right.all(-1).sum(-1) * weights, num_chunks * weights),
    )


def with_noise(
    latents: Float[Array, "*b Z"], key: PRNGKey, sigma: float, scale: Float[Array, "Z"] | None = None
) -> Float[Array, "*b Z"]:
    """latents + sigma * scale * standard normal. `scale` None: sigma in latent units; the aggregate standard
    deviation: relative.
    """
    noise = jax.random.normal(key, latents.shape, latents.dtype) * sigma
    return latents + (noise if scale is None else noise * scale)


class LatentMoments(NamedTuple):
    """Sums over chunks from which the aggregate posterior's spread, dimension by dimension, follows. Float32 sums:
    keep each part below about a million chunks and add parts in float64 on the host."""

    mean: Float[Array, "Z"]
    mean_squared: Float[Array, "Z"]
    variance: Float[Array, "Z"]
    std: Float[Array, "Z"]
    kl: Float[Array, "Z"]
    count: Float[Array, ""]

    def __add__(self, other: "LatentMoments") -> "LatentMoments":  # type: ignore[override]
        return LatentMoments(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def variance_of_means(self):
        """Var over chunks of the posterior mean, `[Z]`."""
        return self.mean_squared / self.count - (self.mean / self.count) ** 2

    @property
    def aggregate_std(self):
        """Standard deviation of the aggregate posterior, `[Z]`: variance of the means plus mean of the variances."""
        return (jnp.maximum(self.variance_of_means, 0) + self.variance / self.count) ** 0.5

    @property
    def posterior_std(self):
        """Mean posterior standard deviation (sigma), `[Z]`."""
        return self.std / self.count

    @property
    def active_dimensions(self) -> int:
        """Dimensions whose posterior mean varies over the data (variance above 0.01); the others have collapsed."""
        return int((self.variance_of_means > 0.01).sum())


def latent_moments(
    mean: Float[Array, "*b Z"], std: Float[Array, "*b Z"], kl: Float[Array, "*b Z"], weights: Float[Array, "*b"]
) -> LatentMoments:
    """Weighted sums over the leading axes; weight 0 leaves a chunk out."""

    def weighted(value):
        return jnp.einsum("rz,r->z", value.reshape(-1, value.shape[-1]), weights.reshape(-1))

    return LatentMoments(weighted(mean), weighted(mean**2), weighted(std**2), weighted(std), weighted(kl), weights.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyAccuracy:
    """Accuracy of decoding the posterior mean plus noise of standard deviation `sigma`.

    `relative` is sigma in units of the aggregate standard deviation, averaged over dimensions.
    """

    sigma: float
    relative: float
    tokens: Interval
    chunks: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderReport:
    """Reconstruction of an autoencoder, and the spread of its latents.

    Attributes:
        noise: accuracy at each noise level, sigma 0 (the posterior mean itself) first.
        sampled: accuracy of decoding a sample of the posterior; sigma is the posterior's own mean.
        posterior_std, aggregate_std: averaged over dimensions, in latent units.
        posterior_std_relative: their ratio, dimension by dimension, averaged.
        kl: nats per chunk; latent_dim, active_dimensions: dimensions, and those whose mean varies.
    """

    name: str
    protocol: TextProtocol
    noise: list[NoisyAccuracy]
    sampled: NoisyAccuracy
    posterior_std: float
    aggregate_std: float
    posterior_std_relative: float
    kl: float
    latent_dim: int
    active_dimensions: int
    tokens_per_second: float | None = None

    @property
    def token_accuracy(self) -> Interval:
        return self.noise[0].tokens

    @property
    def chunk_accuracy(self) -> Interval:
        return self.noise[0].chunks

    def scalars(self) -> dict[str, float]:
        """The estimates alone: for a training log."""
        values = {"token_accuracy": self.token_accuracy.estimate, "chunk_accuracy": self.chunk_accuracy.estimate}
        for each in self.noise[1:]:
            values[f"token_accuracy_noise_{each.sigma:g}"] = each.tokens.estimate
            values[f"chunk_accuracy_noise_{each.sigma:g}"] = each.chunks.estimate
        return {**values, "posterior_std": self.posterior_std, "active_dimensions": float(self.active_dimensions)}

    def to_dict(self) -> dict:
        values = dataclasses.asdict(self)
        for entry, source in zip([*values["noise"], values["sampled"]], [*self.noise, self.sampled], strict=True):
            entry["tokens"], entry["chunks"] = source.tokens.to_dict(), source.chunks.to_dict()
        return values

    def table(self, *, markdown: bool = False) -> str:
        named = [("posterior mean" if not each.sigma else f"noise {each.sigma:g}", each) for each in self.noise]
        rows = [
            [name, f"{each.relative:.2f}", interval_text(each.tokens.scaled(100.0)), interval_text(each.chunks.scaled(100.0))]
            for name, each in [*named, ("posterior sample", self.sampled)]
        ]
        header = ["decoded from", "sigma / aggregate std", "tokens right %", "chunks right %"]
        return "\n".join(
            [
                table(header, rows, markdown=markdown),
                "",
                f"posterior std {self.posterior_std:.3f}, aggregate std {self.aggregate_std:.3f}, "
                f"KL {self.kl:.1f} nats a chunk, {self.active_dimensions} of {self.latent_dim} dimensions active",
                self.protocol.line(),
            ]
        )


@partial(jax.jit, static_argnames=("graph",))
def _score_autoencoder(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey, sigmas: Float[Array, "L"]
) -> tuple[Float[Array, "B F"], LatentMoments]:
    """Right tokens (as chunks' worth) and right chunks of each block at every noise level and for a posterior
    sample.
    """
    autoencoder = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size)
    posterior = autoencoder.encode(chunks)

    keys = jax.vmap(partial(jax.random.fold_in, stream(key, "noise")))(rows)
    noise = jax.vmap(lambda key: with_noise(jnp.zeros(posterior.mean.shape[1:]), key, 1.0))(keys)

    def right(latents: Float[Array, "B N Z"]) -> Float[Array, "B 2"]:
        sums = reconstruction(autoencoder.decode(latents), chunks)
        return jnp.stack([sums.tokens.total / chunks.shape[-1], sums.chunks.total], -1)

    # The same standard normals at every level: a curve over sigma, not a cloud.
    levels = jax.lax.map(lambda sigma: right(posterior.mean + sigma * noise), sigmas)
    every = jnp.concatenate([levels, right(jax.vmap(type(posterior).sample)(posterior, keys))[None]])
    ones = jnp.ones(chunks.shape[1])
    moments = jax.vmap(lambda mean, std, kl: latent_moments(mean, std, kl, ones))(posterior.mean, posterior.std, posterior.kl())
    return every.transpose(1, 0, 2).reshape(len(tokens), -1), moments


def evaluate_autoencoder(
    autoencoder: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    noise: Sequence[float] = (0.3,),
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "autoencoder",
) -> AutoencoderReport:
    """Token and chunk accuracy from the posterior mean, the mean plus noise, and a posterior sample; and the latents' spread.

    Args:
        autoencoder: `calm.core.autoencoder.Autoencoder`, or a module with its `encode`, `decode` and `config.chunk_size`.
        blocks, document: token blocks, and the document that each begins in.
        noise: standard deviations in latent units.
    Raises:
        UsageError: blocks that do not fit the chunk size or the protocol, negative noise.
    """
    chunk_size = autoencoder.config.chunk_size
    text = checked(blocks, document, chunk_size, text)
    if any(not sigma >= 0 for sigma in noise):
        raise UsageError(f"noise is a list of standard deviations, each at least 0, got {list(noise)}")
    sigmas = [0.0, *[float(sigma) for sigma in noise if sigma]]
    graph, params = nnx.split(autoencoder)
    levels = np.asarray(sigmas, np.float32)
    (totals, moments), rate = run_blocks(
        lambda tokens, rows: _score_autoencoder(graph, params, tokens, rows, key, levels), blocks, batch_size
    )
    moments = LatentMoments(*(np.asarray(part, np.float64).sum(0) for part in moments))
    aggregate, posterior = np.asarray(moments.aggregate_std), np.asarray(moments.posterior_std)
    inverse = np.mean(1 / np.maximum(aggregate, 1e-12))
    sums = sums_of(totals, blocks.shape[1] // chunk_size, document, blocks.shape[1])
    intervals = bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(totals.shape[1])])
    relative_posterior = float(np.mean(posterior / np.maximum(aggregate, 1e-12)))
    every = [
        NoisyAccuracy(sigma=sigma, relative=relative, tokens=intervals[2 * i], chunks=intervals[2 * i + 1])
        for i, (sigma, relative) in enumerate(
            [*[(sigma, float(sigma * inverse)) for sigma in sigmas], (float(posterior.mean()), relative_posterior)]
        )
    ]
    return AutoencoderReport(
        name=name,
        protocol=text,
        noise=every[:-1],
        sampled=every[-1],
        posterior_std=float(posterior.mean()),
        aggregate_std=float(aggregate.mean()),
        posterior_std_relative=relative_posterior,
        kl=float((moments.kl / moments.count).sum()),
        latent_dim=len(aggregate),
        active_dimensions=moments.active_dimensions,
        tokens_per_second=rate,
    )
