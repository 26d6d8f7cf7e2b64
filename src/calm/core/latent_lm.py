"""CALM: a language model that predicts the next latent instead of the next token."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.backbone import BackboneConfig, BackboneState
from calm.core.dense import Precision
from calm.core.energy_head import EnergyHeadConfig
from calm.core.stem import ChunkCompression, Reads
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.heads import HeadConfig
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
    """what the model reads of each chunk: its tokens, its latent (continuous), or both"""
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = EnergyHeadConfig()
    context_decoder: ContextDecoderConfig | None = None
    """a small autoregressive decoder that writes the chunk; none = the frozen autoencoder reads the latent (pure CALM)"""
    init_std: float | None = None
    """standard deviation of the stem's embedding and kernels; none = 1 / sqrt(width or fan-in); published 0.02"""

    @property
    def has_latents(self) -> bool:
        """Whether anything in it is a latent: not where tokens are read and a context decoder writes from the hidden state."""
        return self.stem != "discrete" or self.context_decoder is None or self.context_decoder.use_latent

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
        """Forward and backward FLOPs of the same position."""
        return self.backbone.training_flops(context) + 3 * self._around_flops(num_samples)

    def _around_flops(self, num_samples: int) -> int:
        """Forward, of stem and head."""
        dim = self.backbone.dim
        stem = ChunkCompression.flops(self.chunk_size, dim, self.latent_dim, self.stem)
        return stem + self.head.flops(dim, self.latent_dim, num_samples)

    def writing_flops(self, num_samples: int) -> int:
        """Forward FLOPs of the context decoder at one position, for `num_samples` latents; 0 without one."""
        if self.context_decoder is None:
            return 0
        sizes = (self.backbone.dim, self.latent_dim, self.chunk_size, self.vocab_size)
        return self.context_decoder.flops(*sizes, num_samples)


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

    def init_state(
        self, batch: int, context: int, starts: Int[Array, "B"] | None = None, *, rewindable: bool = False
    ) -> BackboneState:
        """The state before the first chunk, with room for `context` chunks; row b begins at chunk `starts[b]`."""
        return self.backbone.init_state(batch, context, starts, rewindable=rewindable)

    def fork(self, state: BackboneState, ends: Int[Array, "A"], num_branches: int, capacity: int) -> BackboneState:
        """Branches of a rewindable state, from behind its first `ends[a]` chunks each (`calm.nn.Backbone.fork`)."""
        return self.backbone.fork(state, ends, num_branches, capacity)

    def rewind(self, state: BackboneState, position: int | Int[Array, ""]) -> BackboneState:
        """A rewindable state as it was after `position` chunks."""
        return self.backbone.rewind(state, position)

    def hidden(
        self, chunks: Int[Array, "B N K"], state: BackboneState | None = None, autoencoder: Autoencoder | None = None
    ) -> tuple[Float[Array, "B N D"], BackboneState | None]:
        """Position i has read chunks 0..i and predicts chunk i + 1. With a state, the chunks continue what it has read.

        A stem that reads latents needs the autoencoder, whose encoder makes them; else it is not looked at.
        """
        latents = None
        if self.stem.reads_latents:
            if autoencoder is None:
                raise UsageError(f"a model with stem {self.config.stem!r} reads latents: give its autoencoder with the chunks")
            latents = autoencoder.encode(chunks).mean
        return self.backbone(self.stem(chunks, latents), state)

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self.head.sample(key, hidden, num_samples)
