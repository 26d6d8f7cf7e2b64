"""A hierarchical autoencoder: K tokens -> P parts with a latent each -> one latent, and back.

P parts of a chunk · Y latent width of a part

Not in CALM. Hierarchies of autoencoders: MusicVAE (Roberts et al. 2018, arXiv:1803.05428), whose levels are recurrent, and
VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446), which keeps the codes of both levels; here the upper one is the code.
"""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder, Level
from calm.core.dense import Dense, Precision, dense_flops
from calm.core.posterior import Posterior
from calm.errors import UsageError


@AutoencoderConfig.register("hierarchical")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HierarchicalAutoencoderConfig(AutoencoderConfig):
    """Sizes of an autoencoder of two levels; what `AutoencoderConfig` describes is the upper one."""

    lower_chunk_size: int = 2
    """tokens of a part; divides chunk_size and is less"""
    lower_latent_dim: int = 64
    """Y, latent width of a part"""
    lower_weight: float = 1.0
    """weight of the loss of the lower level alone, so that both levels are codes from which the text comes back"""

    def __post_init__(self) -> None:
        if not 0 < self.lower_chunk_size < self.chunk_size or self.chunk_size % self.lower_chunk_size:
            divides = f"must divide chunk_size={self.chunk_size} and be less"
            raise UsageError(f"autoencoder: lower_chunk_size {divides}, got {self.lower_chunk_size}")
        if self.lower_weight < 0:
            raise UsageError(f"autoencoder: lower_weight must not be negative, got {self.lower_weight}")
        super().__post_init__()
        self._check_width("lower_latent_dim")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "HierarchicalAutoencoder":
        return HierarchicalAutoencoder(self, rngs=rngs, precision=precision)

    @property
    def lower(self) -> AutoencoderConfig:
        """The autoencoder of the parts."""
        shared: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(AutoencoderConfig)}
        shared |= dict(chunk_size=self.lower_chunk_size, latent_dim=self.lower_latent_dim)
        return AutoencoderConfig(**shared)

    @property
    def places(self) -> int:
        """P, number of parts."""
        return self.chunk_size // self.lower_chunk_size

    def encoder_flops(self) -> int:
        of_part = self.lower.encoder_flops() + dense_flops(self.lower_latent_dim, self.dim)
        return super().encoder_flops() + self.places * of_part

    def decoder_flops(self) -> int:
        of_part = self.lower.decoder_flops() + dense_flops(self.dim, self.lower_latent_dim)
        return super().decoder_flops() + self.places * of_part

    def training_flops(self) -> int:
        own = self.places * self.lower.decoder_flops() + self.vocabulary_flops() if self.lower_weight else 0
        return super().training_flops() + 3 * own


class HierarchicalAutoencoder(Autoencoder):
    """Two autoencoders, one on top of the other.

    `lower` codes every part of the chunk alone, with the same weights, and is an `Autoencoder` in its own right: its
    latents decode without the upper level. The upper level is built as it is, over P latents in place of K embeddings. It
    reads the means of the parts' posteriors, so that a chunk has one posterior; it decodes to latents of the lower level,
    whose decoder gives the tokens' states. The language model works on the upper latent alone.
    """

    def __init__(self, config: HierarchicalAutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config: Any = config
        self.precision = precision
        self.lower = Autoencoder(config.lower, rngs=rngs, precision=precision)
        sizes = dict(use_bias=True, init_std=config.init_std, precision=precision, rngs=rngs)
        self.from_lower = Dense(config.lower_latent_dim, config.dim, **sizes)
        self.encoder = Encoder(config, rngs=rngs, precision=precision)
        self.decoder = Decoder(config, rngs=rngs, precision=precision)
        self.to_lower = Dense(config.dim, config.lower_latent_dim, **sizes)

    @property
    def table(self) -> Float[Array, "V D"]:
        return self.lower.table

    def encode(self, chunks: Int[Array, "*b K"]) -> Posterior:
        return self.encode_upper(self.encode_lower(chunks))

    def levels(self, read: Int[Array, "*b K"], chunks: Int[Array, "*b K"]) -> list[Level]:
        lower = self.encode_lower(read)
        levels = [Level("", 1.0, self, self.encode_upper(lower), chunks)]
        if self.config.lower_weight:
            parts = chunks.reshape(*lower.mean.shape[:-1], -1)
            levels.append(Level("lower", self.config.lower_weight * parts.shape[1], self.lower, lower, parts))
        return levels

    def encode_lower(self, chunks: Int[Array, "*b K"]) -> Posterior:
        """Posterior of each part's latent, `[*b P Y]`."""
        return self.lower.encode(chunks.reshape(*chunks.shape[:-1], self.config.places, -1))

    def encode_upper(self, lower: Posterior) -> Posterior:
        """Posterior of each chunk's latent, `[*b Z]`, from those of its parts."""
        return self.encoder(self.from_lower(lower.mean))

    def decode_lower(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b P Y"]:
        """The parts' latents, as the lower decoder reads them."""
        return self.to_lower(self.decoder(latents))

    def decode_states(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K D"]:
        states = self.lower.decode_states(self.decode_lower(latents))
        return states.reshape(*latents.shape[:-1], self.config.chunk_size, -1)
