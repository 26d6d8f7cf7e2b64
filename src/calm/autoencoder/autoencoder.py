"""The autoencoder: every chunk of K tokens is coded alone, into one latent of width Z."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.autoencoder.decoder import Decoder, best_token
from calm.autoencoder.encoder import Encoder
from calm.errors import UsageError
from calm.nn.dense import Precision, dense_flops, matmul
from calm.nn.mlp import SwiGLU
from calm.posterior import POSTERIORS, Posterior, PosteriorKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. The published one is K=4, Z=128, dim=512, inner_dim=1280, both stds .02."""

    vocab_size: int = 0
    """V; 0 = taken from the data's tokenizer"""
    chunk_size: int = 4
    """K, tokens per chunk"""
    latent_dim: int = 64
    """Z, latent width"""
    posterior: PosteriorKind = "gaussian"
    """law of a chunk's latent: gaussian, as published, or power_spherical, on the sphere of radius sqrt(Z)"""
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
        if self.vocab_size < 0 or min(self.chunk_size, self.latent_dim, self.dim, self.inner_dim) < 1:
            raise UsageError("autoencoder: chunk_size, latent_dim, dim and inner_dim must be at least 1")
        if self.posterior not in POSTERIORS:
            raise UsageError(f"autoencoder: unknown posterior {self.posterior!r}; choose one of {', '.join(POSTERIORS)}")
        if self.posterior == "power_spherical" and self.latent_dim < 2:
            raise UsageError(f"autoencoder: a power_spherical posterior needs latent_dim of at least 2, got {self.latent_dim}")
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise UsageError(f"autoencoder: {name} must be even and at least 2, got {getattr(self, name)}")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Autoencoder":
        return Autoencoder(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        """Number of weights, counted on shapes without allocating."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    def encoder_flops(self) -> int:
        """Forward FLOPs of encoding one chunk."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.encoder_layers // 2
        squeeze = dense_flops(self.chunk_size * self.dim, self.dim)
        squeeze += dense_flops(self.dim, POSTERIORS[self.posterior].outputs(self.latent_dim))
        return stages * (self.chunk_size + 1) * layer + squeeze

    def decoder_flops(self) -> int:
        """Forward FLOPs of decoding one latent to K hidden states."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.decoder_layers // 2
        expand = dense_flops(self.latent_dim, self.dim) + dense_flops(self.dim, self.chunk_size * self.dim)
        return stages * (self.chunk_size + 1) * layer + expand

    def vocabulary_flops(self) -> int:
        """Forward FLOPs of the logits of one chunk."""
        return self.chunk_size * dense_flops(self.dim, self.vocab_size)


class Autoencoder(nnx.Module):
    """Encoder and decoder around one embedding table, which is also the decoder's output projection (CALM)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        if config.vocab_size < 1:
            raise UsageError("autoencoder: vocab_size must be set before the model is built")
        self.config, self.precision = config, precision
        shape = (config.vocab_size, config.dim)
        self.embedding = nnx.Param(config.embedding_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        sizes = dict(
            chunk_size=config.chunk_size,
            latent_dim=config.latent_dim,
            posterior=config.posterior,
            dim=config.dim,
            inner_dim=config.inner_dim,
            init_std=config.init_std,
            precision=precision,
            rngs=rngs,
        )
        self.encoder = Encoder(layers_per_stage=config.encoder_layers // 2, **sizes)
        self.decoder = Decoder(layers_per_stage=config.decoder_layers // 2, **sizes)

    @property
    def table(self) -> Float[Array, "V D"]:
        """The tied table: embeds tokens on the way in, scores them on the way out."""
        return self.embedding[...]

    def encode(self, chunks: Int[Array, "*b K"]) -> Posterior:
        """The posterior of each chunk's latent, `[*b Z]`."""
        return self.encoder(self.table[chunks])

    def decode_states(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        """The hidden states whose product with the table are the logits."""
        return self.decoder(latents)

    def logits(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K V"]:
        states = self.decode_states(latents)
        flat = matmul(states.reshape(-1, states.shape[-1]), self.table.T, self.precision)
        return flat.reshape(*states.shape[:-1], -1)

    def decode(self, latents: Float[Array, "*b Z"]) -> Int[Array, "*b K"]:
        """The most probable token at each of the K places."""
        return best_token(self.decode_states(latents), self.table, self.precision)
