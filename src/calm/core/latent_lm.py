"""CALM: a language model that predicts the next latent instead of the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.chunk_decoder import DecoderConfig
from calm.core.dense import Dense, Precision, dense_flops
from calm.core.energy_head import EnergyHeadConfig
from calm.core.head import HeadConfig
from calm.core.stem import ChunkCompression, Reads
from calm.core.transformer import BackboneState, TransformerConfig
from calm.errors import UsageError
from calm.rng import PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLMConfig:
    """Stem, backbone and head of the next-vector model."""

    vocab_size: int = 0
    """V; 0 = taken from the autoencoder"""
    chunk_size: int = 0
    """K; 0 = taken from the autoencoder"""
    latent_dim: int = 0
    """Z; 0 = taken from the autoencoder"""
    stem: Reads = "discrete"
    """input of each chunk: its tokens, its latent (continuous), or both"""
    backbone: TransformerConfig = TransformerConfig()
    head: HeadConfig = EnergyHeadConfig()
    context_decoder: DecoderConfig | None = None
    """a decoder trained with the model that writes the chunk; none = the frozen autoencoder decodes the latent (pure CALM)"""
    head_reads_chunk: bool = False
    """whether the tokens of the chunk just read reach the head directly as well, beside the backbone; not in the paper"""
    init_std: float | None = None
    """standard deviation of the stem's embedding and kernels; none = 1 / sqrt(width or fan-in); published 0.02"""

    def __post_init__(self) -> None:
        if self.head_reads_chunk and self.stem == "continuous":
            raise UsageError("latent LM: head_reads_chunk needs a stem that embeds tokens, got stem='continuous'")

    @property
    def has_latents(self) -> bool:
        """Whether it reads or writes latents at all."""
        return self.stem != "discrete" or self.decoder_reads_latent

    @property
    def decoder_reads_latent(self) -> bool:
        """Whether tokens are decoded from sampled latents."""
        return self.context_decoder is None or self.context_decoder.reads_latent

    def require_sizes_of(self, autoencoder: AutoencoderConfig) -> None:
        """Raises UsageError unless vocabulary, chunk size and latent width are the autoencoder's."""
        for name in ("chunk_size", "vocab_size", "latent_dim"):
            ours, theirs = getattr(self, name), getattr(autoencoder, name)
            if ours != theirs:
                raise UsageError(
                    f"the language model has {name}={ours} and the autoencoder {theirs}: they were not trained together"
                )

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "LatentLM":
        return LatentLM(self, rngs=rngs, precision=precision)

    def parameters(self) -> int:
        """Number of weights, counted on shapes without allocating; the autoencoder's are not among them."""
        model = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(model)))

    def flops(self, context: int, num_samples: int) -> int:
        """Forward FLOPs of one position: stem, backbone over `context` chunks, and `num_samples` samples of the head."""
        return self.backbone.flops(context) + self._around_flops(num_samples)

    def training_flops(self, context: int, num_samples: int) -> int:
        """Forward and backward FLOPs of the same position; without samples the head costs none."""
        around = self._around_flops(num_samples) if num_samples else self._stem_flops()
        return self.backbone.training_flops(context) + 3 * around

    def _around_flops(self, num_samples: int) -> int:
        """Forward, of stem and head."""
        return self._stem_flops() + self.head.flops(self.backbone.dim, self.latent_dim, num_samples)

    def _stem_flops(self) -> int:
        """Forward, of the stem and of what it gives the head directly."""
        dim = self.backbone.dim
        stem = ChunkCompression.flops(self.chunk_size, dim, self.latent_dim, self.stem)
        direct = DirectChunk.flops(self.chunk_size, dim) if self.head_reads_chunk else 0
        return stem + direct

    def writing_flops(self, num_samples: int) -> int:
        """Forward FLOPs of the context decoder at one position, for `num_samples` latents; 0 without one."""
        if self.context_decoder is None:
            return 0
        sizes = (self.backbone.dim, self.latent_dim, self.chunk_size, self.vocab_size)
        return self.context_decoder.flops(*sizes, num_samples)


class DirectChunk(nnx.Module):
    """A linear map of the embeddings of a chunk's K tokens, normalised together, that is added to the hidden state.

    The stem has to squeeze K tokens into one vector that also serves the backbone, and a young model's head hardly sees the
    tokens just read through it; on this way each of them is one product away. It may also replace the backbone, which then is
    not read: `calm.evaluate.backbone_use` measures that.
    """

    def __init__(self, chunk_size: int, dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(chunk_size * dim, epsilon=1e-6, rngs=rngs)
        self.out = Dense(chunk_size * dim, dim, precision=precision, rngs=rngs)

    def __call__(self, embedded: Float[Array, "*b K D"]) -> Float[Array, "*b D"]:
        return self.out(self.norm(embedded.reshape(*embedded.shape[:-2], -1)))

    @staticmethod
    def flops(chunk_size: int, dim: int) -> int:
        """Forward FLOPs of one chunk."""
        return dense_flops(chunk_size * dim, dim)


class LatentLM(nnx.Module):
    """Chunks in, samples of the next chunk's latent out (CALM, arXiv:2510.27688).

    It does not own the autoencoder: targets, decoding and generation take both.
    """

    def __init__(self, config: LatentLMConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        if min(config.vocab_size, config.chunk_size, config.latent_dim) < 1:
            raise UsageError("latent LM: vocab_size, chunk_size and latent_dim must be set before the model is built")
        self.config, self.precision = config, precision
        dim = config.backbone.dim
        self.stem = ChunkCompression(
            config.vocab_size,
            config.chunk_size,
            dim,
            reads=config.stem,
            latent_dim=config.latent_dim,
            init_std=config.init_std,
            precision=precision,
            rngs=rngs,
        )
        self.backbone = config.backbone.build(rngs=rngs, precision=precision)
        self.head = config.head.build(dim, config.latent_dim, rngs=rngs, precision=precision)
        writer = config.context_decoder
        sizes = (config.vocab_size, config.chunk_size, dim, config.latent_dim)
        self.context_decoder = None if writer is None else writer.build(*sizes, rngs=rngs, precision=precision)
        direct = config.head_reads_chunk
        self.direct = DirectChunk(config.chunk_size, dim, precision=precision, rngs=rngs) if direct else None

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """The state before the first chunk, with room for `context` chunks; row b begins at chunk `starts[b]`."""
        return self.backbone.init_state(batch, context, starts, rewindable=rewindable)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """Branches of a rewindable state, each from after its first `ends[a]` chunks (`Backbone.fork`)."""
        return self.backbone.fork(state, ends, num_branches, capacity)

    def rewind(self, state: BackboneState, position: int | Int[Array, ""]) -> BackboneState:
        """A rewindable state as it was after `position` chunks."""
        return self.backbone.rewind(state, position)

    def hidden(
        self, chunks: Int[Array, "B N K"], state: BackboneState | None = None, autoencoder: Autoencoder | None = None
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        """Position i has read chunks 0..i and predicts chunk i + 1. With a state, the chunks continue what it has read.

        A stem that reads latents needs the autoencoder, whose encoder computes them; other stems ignore it.
        """
        latents = None
        if self.stem.reads_latents:
            if autoencoder is None:
                raise UsageError(f"a model with stem {self.config.stem!r} reads latents: give its autoencoder with the chunks")
            latents = autoencoder.encode(chunks).mean
        return self.read(chunks, state, latents)

    def read(
        self,
        chunks: Int[Array, "B N K"],
        state: BackboneState | None = None,
        latents: Float[Array, "B N Z"] | None = None,
        embedded: Float[Array, "B N K D"] | None = None,
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        """Same as `hidden`, with the latents that the stem reads; `embedded` replaces the embeddings of the chunks' tokens."""
        hidden, state = self.backbone(self.stem(chunks, latents, embedded), state)
        return hidden if self.direct is None else hidden + self.read_directly(chunks, embedded), state

    def read_directly(self, chunks: Int[Array, "*b K"], embedded: Float[Array, "*b K D"] | None = None) -> Float[Array, "*b D"]:
        """The part of each hidden state that its last chunk gives without the backbone: zeros unless `head_reads_chunk`."""
        if self.direct is None:
            return jnp.zeros((*chunks.shape[:-1], self.config.backbone.dim))
        assert self.stem.embedding is not None
        return self.direct(self.stem.embedding[...][chunks] if embedded is None else embedded)

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self.head.sample(key, hidden, num_samples)
