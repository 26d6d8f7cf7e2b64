"""An autoencoder whose latent has one part a token: K codes of width P = Z / K, side by side.

This is the degenerate autoencoder. It recodes each token alone, by a table, so the K tokens of a chunk share nothing in it and
it compresses nothing: Z grows with K, and every token's code is found in its own P numbers. It is here because of how latents
are learned, not of how much they hold. The latents of an encoder over the whole chunk are like a hash: a chunk with one other
token is another point, about half as far away as a chunk with four others, and a head that knows only some of the tokens
gains little. In parts, a token that is known is a part that is known, and the squared error or energy score of a sample is a
sum over tokens.

V vocabulary · K tokens per chunk · P width of a part · Z = K P latent width · *b any leading axes
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder, AutoencoderConfig
from calm.core.dense import Precision
from calm.core.gaussian import Gaussian
from calm.core.posterior import Posterior
from calm.errors import UsageError

LEAST_WIDTH = 2
"""of a part: on a line, codes of one length are two points"""
_UNUSED = ("inner_dim", "encoder_layers", "decoder_layers", "init_std")


@AutoencoderConfig.register("parts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PartsAutoencoderConfig(AutoencoderConfig):
    """Sizes of an autoencoder by parts: vocab_size, chunk_size, latent_dim and embedding_std.

    It has no layers: inner_dim, encoder_layers, decoder_layers and init_std are reset to their defaults, and dim to P.
    embedding_std sets how fast codes turn, since the optimiser's steps are relative to it; their length is fixed.
    """

    std: float = 0.2
    """standard deviation of the posterior before training, of codes whose numbers have mean square 1"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(AutoencoderConfig):
            if field.name in _UNUSED:
                object.__setattr__(self, field.name, field.default)
        if self.posterior != "gaussian":
            raise UsageError(f"autoencoder: kind parts has a gaussian posterior, got posterior={self.posterior!r}")
        if self.std <= 0 or self.embedding_std <= 0:
            raise UsageError("autoencoder: std and embedding_std of kind parts must be above 0")
        if self.chunk_size >= 1:
            object.__setattr__(self, "dim", max(1, self.latent_dim // self.chunk_size))
        super().__post_init__()
        if self.latent_dim % self.chunk_size or self.dim < LEAST_WIDTH:
            raise UsageError(
                f"autoencoder: kind parts needs latent_dim = chunk_size times at least {LEAST_WIDTH}, got "
                f"latent_dim={self.latent_dim} and chunk_size={self.chunk_size}"
            )

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "PartsAutoencoder":
        return PartsAutoencoder(self, rngs=rngs, precision=precision)

    def encoder_flops(self) -> int:
        """0: a chunk is encoded by looking up its codes."""
        return 0

    def decoder_flops(self) -> int:
        """0: the parts of a latent are its states; scoring them is `vocabulary_flops`."""
        return 0


class PartsAutoencoder(Autoencoder):
    """A table of codes, all of length sqrt(P), and a normal distribution of one learned width around each.

    The most probable token is the one whose code is nearest to the part: as all codes have the same length, nearest is largest
    product. A learned sharpness multiplies the products into logits.
    """

    def __init__(self, config: PartsAutoencoderConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        if config.vocab_size < 1:
            raise UsageError("autoencoder: vocab_size must be set before the model is built")
        self.config: AutoencoderConfig = config
        self.precision = precision
        shape = (config.vocab_size, config.dim)
        self.embedding = nnx.Param(config.embedding_std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.log_std = nnx.Param(jnp.full((1,), math.log(config.std), jnp.float32))
        self.log_sharpness = nnx.Param(jnp.zeros((1,), jnp.float32))

    @property
    def table(self) -> Float[Array, "V P"]:
        """The codes: the embeddings, brought to length sqrt(P)."""
        rows = self.embedding[...]
        return rows * jax.lax.rsqrt(jnp.square(rows).mean(-1, keepdims=True) + 1e-12)

    def encode(self, chunks: Int[Array, "*b K"]) -> Posterior:
        """Posterior of each chunk's latent, `[*b Z]`: the codes of its tokens, side by side."""
        mean = self.table[chunks].reshape(*chunks.shape[:-1], self.config.latent_dim)
        return Gaussian(mean, jnp.broadcast_to(self.log_std[...], mean.shape))

    def decode_states(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b K P"]:
        """The parts, sharpened: their products with the codes are the logits."""
        parts = latents.reshape(*latents.shape[:-1], self.config.chunk_size, self.config.dim)
        return jnp.exp(self.log_sharpness[...]) * parts
