"""The autoencoder: every chunk of K tokens is coded alone, into one latent of width Z; in one step, or in two."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.decoder import Decoder, best_token
from calm.core.dense import Dense, Precision, dense_flops, matmul
from calm.core.encoder import Encoder
from calm.core.mlp import SwiGLU
from calm.core.posterior import POSTERIORS, Posterior, PosteriorKind
from calm.errors import UsageError


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
    lower_chunk_size: int = 0
    """tokens of the parts that a lower level codes first, each alone; it divides chunk_size. 0 = one level"""
    lower_latent_dim: int = 64
    """latent width of such a part; unused with one level"""
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
        if self.posterior not in POSTERIORS:
            raise UsageError(f"autoencoder: unknown posterior {self.posterior!r}; choose one of {', '.join(POSTERIORS)}")
        if self.lower_chunk_size and (not 0 < self.lower_chunk_size < self.chunk_size or self.chunk_size % self._part_size):
            divides = f"must divide chunk_size={self.chunk_size} and be less"
            raise UsageError(f"autoencoder: lower_chunk_size {divides}, got {self.lower_chunk_size}")
        for name in ("latent_dim", "lower_latent_dim") if self.lower_chunk_size else ("latent_dim",):
            least = 2 if self.posterior == "power_spherical" else 1
            if (width := getattr(self, name)) < least:
                raise UsageError(f"autoencoder: a {self.posterior} posterior needs {name} of at least {least}, got {width}")
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise UsageError(f"autoencoder: {name} must be even and at least 2, got {getattr(self, name)}")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Autoencoder":
        kind = Autoencoder if self.lower is None else HierarchicalAutoencoder
        return kind(self, rngs=rngs, precision=precision)

    @property
    def lower(self) -> "AutoencoderConfig | None":
        """The autoencoder of the parts, where there are two levels."""
        if not self.lower_chunk_size:
            return None
        sizes = dict(chunk_size=self.lower_chunk_size, latent_dim=self.lower_latent_dim)
        return dataclasses.replace(self, **sizes, lower_chunk_size=0)

    @property
    def places(self) -> int:
        """What the level that makes the latent flattens: P parts, or K tokens."""
        return self.chunk_size // self._part_size

    @property
    def _part_size(self) -> int:
        return max(1, self.lower_chunk_size)

    def parameters(self) -> int:
        """Number of weights, counted on shapes without allocating."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    def encoder_flops(self) -> int:
        """Forward FLOPs of encoding one chunk."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.encoder_layers // 2
        squeeze = dense_flops(self.places * self.dim, self.dim)
        squeeze += dense_flops(self.dim, POSTERIORS[self.posterior].outputs(self.latent_dim))
        of_part = 0 if self.lower is None else self.lower.encoder_flops() + dense_flops(self.lower_latent_dim, self.dim)
        return stages * (self.places + 1) * layer + squeeze + self.places * of_part

    def decoder_flops(self) -> int:
        """Forward FLOPs of decoding one latent to K hidden states."""
        layer, stages = SwiGLU.flops(self.dim, self.inner_dim), self.decoder_layers // 2
        expand = dense_flops(self.latent_dim, self.dim) + dense_flops(self.dim, self.places * self.dim)
        of_part = 0 if self.lower is None else self.lower.decoder_flops() + dense_flops(self.dim, self.lower_latent_dim)
        return stages * (self.places + 1) * layer + expand + self.places * of_part

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
        self.encoder, self.decoder = _coders(config, precision, rngs)

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


class HierarchicalAutoencoder(Autoencoder):
    """Two autoencoders, one on top of the other: K tokens -> P parts' latents -> one latent, and back.

    `lower` codes every part of the chunk alone and with the same weights, and is an `Autoencoder` in its own right: its latents
    decode without the upper level, and whatever takes an autoencoder takes it. The upper level is built as it is, over P
    latents where that one has K tokens. It reads the means of the parts' posteriors, so that a chunk has one posterior and not
    a drawn one; what it decodes to are latents of the lower level, whose decoder writes the tokens. The language model sees
    the upper latent alone, as with one level.

    Not in CALM. Hierarchies of autoencoders: MusicVAE (Roberts et al. 2018, arXiv:1803.05428), whose levels are recurrent, and
    VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446), which keeps the codes of both levels; here the upper one is the code.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        assert config.lower is not None, "one level has no lower one"
        self.config, self.precision = config, precision
        self.lower = Autoencoder(config.lower, rngs=rngs, precision=precision)
        sizes = dict(use_bias=True, init_std=config.init_std, precision=precision, rngs=rngs)
        self.from_lower = Dense(config.lower_latent_dim, config.dim, **sizes)
        self.encoder, self.decoder = _coders(config, precision, rngs)
        self.to_lower = Dense(config.dim, config.lower_latent_dim, **sizes)

    @property
    def table(self) -> Float[Array, "V D"]:
        return self.lower.table

    def encode(self, chunks: Int[Array, "*b K"]) -> Posterior:
        return self.encode_upper(self.encode_lower(chunks))

    def encode_lower(self, chunks: Int[Array, "*b K"]) -> Posterior:
        """The posterior of each part's latent, `[*b P Y]`."""
        return self.lower.encode(chunks.reshape(*chunks.shape[:-1], self.config.places, -1))

    def encode_upper(self, lower: Posterior) -> Posterior:
        """The posterior of each chunk's latent, `[*b Z]`, from those of its parts."""
        return self.encoder(self.from_lower(lower.mean))

    def decode_lower(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b P Y"]:
        """The parts' latents, as the lower decoder reads them."""
        return self.to_lower(self.decoder(latents))

    def decode_states(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        states = self.lower.decode_states(self.decode_lower(latents))
        return states.reshape(*latents.shape[:-1], self.config.chunk_size, -1)


def _coders(config: AutoencoderConfig, precision: Precision, rngs: nnx.Rngs) -> tuple[Encoder, Decoder]:
    """Of the level that makes the latent."""
    sizes = dict(
        chunk_size=config.places,
        latent_dim=config.latent_dim,
        posterior=config.posterior,
        dim=config.dim,
        inner_dim=config.inner_dim,
        init_std=config.init_std,
        precision=precision,
        rngs=rngs,
    )
    encoder = Encoder(layers_per_stage=config.encoder_layers // 2, **sizes)
    return encoder, Decoder(layers_per_stage=config.decoder_layers // 2, **sizes)
