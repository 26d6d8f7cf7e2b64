"""The autoencoder of CALM (arXiv:2510.27688, section 2): it codes every chunk of K tokens alone, into one latent and back.

V vocabulary · K tokens per chunk · Z latent width · D width of the hidden states · *b any leading axes

Encoder: K embeddings -> token layers at each place -> flatten, K*D -> D -> chunk layers -> norm -> the posterior's values.
Decoder: Z -> D -> chunk layers -> D -> K*D -> token layers at each place -> norm -> logits by the tied embedding table.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops, matmul
from calm.core.mlp import ResidualSwiGLU, SwiGLU
from calm.core.posterior import Posterior, Posteriors, posterior_class
from calm.core.stack import Stack
from calm.core.vocabulary import best_token
from calm.errors import UsageError
from calm.registry import Registered


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Registered, family="autoencoder"):
    """Sizes of the autoencoder. The published one is K=4, Z=128, dim=512, inner_dim=1280, both stds .02."""

    vocab_size: int = 0
    """V; 0 = taken from the data's tokenizer"""
    chunk_size: int = 4
    """K, tokens per chunk"""
    latent_dim: int = 64
    """Z, latent width"""
    posterior: str = "gaussian"
    """distribution of a chunk's latent: gaussian, as published, or power_spherical, on the sphere of radius sqrt(Z)"""
    dim: int = 128
    """width D of the hidden states"""
    inner_dim: int = 320
    """inner width of the SwiGLU layers"""
    encoder_layers: int = 2
    """even: half before the chunk is flattened, half after"""
    decoder_layers: int = 2
    """even: half before the chunk is unfolded, half after"""
    embedding_std: float = 0.1
    """standard deviation of the initial embeddings; .02 as published learns several times slower at small widths"""
    init_std: float | None = None
    """standard deviation of the kernels; none = 1 / sqrt(fan-in); the published models use 0.02"""

    def __post_init__(self) -> None:
        if self.vocab_size < 0 or min(self.chunk_size, self.dim, self.inner_dim) < 1:
            raise UsageError("autoencoder: chunk_size, dim and inner_dim must be at least 1, vocab_size at least 0")
        if self.posterior not in Posteriors.names():
            raise UsageError(
                f"autoencoder: unknown posterior {self.posterior!r}; choose one of {', '.join(Posteriors.names())}"
            )
        self._check_width("latent_dim")
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise UsageError(f"autoencoder: {name} must be even and at least 2, got {getattr(self, name)}")

    def _check_width(self, name: str) -> None:
        least = posterior_class(self.posterior).least_width()
        if (width := getattr(self, name)) < least:
            raise UsageError(f"autoencoder: a {self.posterior} posterior needs {name} of at least {least}, got {width}")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Autoencoder":
        return Autoencoder(self, rngs=rngs, precision=precision)

    @property
    def places(self) -> int:
        """Number of vectors that the encoder flattens and the decoder unfolds: K tokens."""
        return self.chunk_size

    def parameters(self) -> int:
        """Number of weights, counted on shapes without allocating."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    def encoder_flops(self) -> int:
        """Forward FLOPs of encoding one chunk."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.encoder_layers // 2
        squeeze = dense_flops(self.places * self.dim, self.dim)
        squeeze += dense_flops(self.dim, posterior_class(self.posterior).outputs(self.latent_dim))
        return stages * (self.places + 1) * layer + squeeze

    def decoder_flops(self) -> int:
        """Forward FLOPs of decoding one latent to K hidden states."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.decoder_layers // 2
        expand = dense_flops(self.latent_dim, self.dim) + dense_flops(self.dim, self.places * self.dim)
        return stages * (self.places + 1) * layer + expand

    def vocabulary_flops(self) -> int:
        """Forward FLOPs of the logits of one chunk."""
        return self.chunk_size * dense_flops(self.dim, self.vocab_size)

    def training_flops(self) -> int:
        """Forward and backward FLOPs of the objective on one chunk; the backward pass counts twice the forward."""
        return 3 * (self.encoder_flops() + self.decoder_flops() + self.vocabulary_flops())


AutoencoderConfig.register("flat")(AutoencoderConfig)


class Level(NamedTuple):
    """One level of an autoencoder, as the objective trains it."""

    name: str
    """prefix of the level's metrics, and its random stream; empty for the whole chunk"""
    weight: float
    autoencoder: "Autoencoder"
    posterior: Posterior
    chunks: Int[Array, "*p K"]


class _Parts:
    """Builds the parts that encoder and decoder are made of."""

    def __init__(self, config: AutoencoderConfig, precision: Precision, rngs: nnx.Rngs):
        self.config, self.options = config, dict(init_std=config.init_std, precision=precision)
        self.rngs = rngs

    def layers(self, count: int) -> Stack:
        dim, inner_dim = self.config.dim, self.config.inner_dim
        return Stack(lambda rngs: ResidualSwiGLU(dim, inner_dim, **self.options, rngs=rngs), count, rngs=self.rngs)

    def dense(self, in_dim: int, out_dim: int) -> Dense:
        return Dense(in_dim, out_dim, use_bias=True, **self.options, rngs=self.rngs)

    def norm(self) -> nnx.RMSNorm:
        return nnx.RMSNorm(self.config.dim, epsilon=1e-6, rngs=self.rngs)


def apply_layers(layers: Stack, hidden: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """Applies stacked residual layers one after the other."""
    return layers.scan(lambda layer, hidden, _: (layer(hidden), None), hidden)[0]


class Encoder(nnx.Module):
    """Embeddings of the K places to the posterior of their latent."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision):
        parts, stages = _Parts(config, precision, rngs), config.encoder_layers // 2
        self.token_layers = parts.layers(stages)
        self.squeeze = parts.dense(config.places * config.dim, config.dim)
        self.chunk_layers = parts.layers(stages)
        self.norm = parts.norm()
        self.posterior = config.posterior
        self.to_latent = parts.dense(config.dim, posterior_class(config.posterior).outputs(config.latent_dim))

    def __call__(self, embedded: Float[Array, "*b K D"]) -> Posterior:
        hidden = apply_layers(self.token_layers, embedded)
        hidden = self.squeeze(hidden.reshape(*hidden.shape[:-2], -1))
        hidden = self.norm(apply_layers(self.chunk_layers, hidden))
        return posterior_class(self.posterior).of(self.to_latent(hidden))


class Decoder(nnx.Module):
    """A latent to the hidden states of its K places: the encoder mirrored.

    A vector is first mapped to where latents of the posterior's kind lie. Nothing keeps a language model's samples on a sphere,
    and the energy score is proper in all of R^Z; but the decoder was trained at one radius, and the radius carries nothing.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision):
        parts, stages = _Parts(config, precision, rngs), config.decoder_layers // 2
        self.from_latent = parts.dense(config.latent_dim, config.dim)
        self.chunk_layers = parts.layers(stages)
        self.expand = parts.dense(config.dim, config.places * config.dim)
        self.token_layers = parts.layers(stages)
        self.norm = parts.norm()
        self.places, self.posterior = config.places, config.posterior

    def __call__(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        hidden = apply_layers(self.chunk_layers, self.from_latent(posterior_class(self.posterior).onto(latents)))
        hidden = self.expand(hidden)
        hidden = hidden.reshape(*hidden.shape[:-1], self.places, -1)
        return self.norm(apply_layers(self.token_layers, hidden))


class Autoencoder(nnx.Module):
    """Encoder and decoder around one embedding table, which is also the decoder's output projection."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        if config.vocab_size < 1:
            raise UsageError("autoencoder: vocab_size must be set before the model is built")
        self.config: Any = config
        self.precision = precision
        shape = (config.vocab_size, config.dim)
        self.embedding = nnx.Param(config.embedding_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.encoder = Encoder(config, rngs=rngs, precision=precision)
        self.decoder = Decoder(config, rngs=rngs, precision=precision)

    @property
    def table(self) -> Float[Array, "V D"]:
        """The tied table: embeds tokens on the way in, scores them on the way out."""
        return self.embedding[...]

    def encode(self, chunks: Int[Array, "*b K"]) -> Posterior:
        """Posterior of each chunk's latent, `[*b Z]`."""
        return self.encoder(self.table[chunks])

    def levels(self, read: Int[Array, "*b K"], chunks: Int[Array, "*b K"]) -> list[Level]:
        """Levels to train, given the chunks as the encoder reads them (with masked tokens) and as they are."""
        return [Level("", 1.0, self, self.encode(read), chunks)]

    def decode_states(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        """Hidden states whose product with the table are the logits."""
        return self.decoder(latents)

    def logits(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K V"]:
        """Logits of the token at each of the K places."""
        states = self.decode_states(latents)
        flat = matmul(states.reshape(-1, states.shape[-1]), self.table.T, self.precision)
        return flat.reshape(*states.shape[:-1], -1)

    def decode(self, latents: Float[Array, "*b Z"]) -> Int[Array, "*b K"]:
        """The most probable token at each of the K places."""
        return best_token(self.decode_states(latents), self.table, self.precision)
