"""What stands in front of the backbone."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.nn.dense import Dense, Precision, dense_flops


class ChunkCompression(nnx.Module):
    """K tokens to one vector: embed, flatten, K*D -> 2D, SiLU, 2D -> D, LayerNorm (CALM, discrete input).

    The model reads tokens, also its own: a sampled latent is decoded and comes back in here. Feeding latents back directly does
    worse in the paper's ablation.
    """

    def __init__(
        self,
        vocab_size: int,
        chunk_size: int,
        dim: int,
        *,
        init_std: float | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        # A linear map follows, so the scale matters little; rows of about unit length are the fan-in of one token.
        std = dim**-0.5 if init_std is None else init_std
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32))
        sizes = dict(use_bias=True, init_std=init_std, precision=precision, rngs=rngs)
        self.widen = Dense(chunk_size * dim, 2 * dim, **sizes)
        self.narrow = Dense(2 * dim, dim, **sizes)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)

    def __call__(self, chunks: Int[Array, "*b K"]) -> Float[Array, "*b D"]:
        embedded = self.embedding[...][chunks]
        hidden = self.widen(embedded.reshape(*chunks.shape[:-1], -1))
        return self.norm(self.narrow(jax.nn.silu(hidden)))

    @staticmethod
    def flops(chunk_size: int, dim: int) -> int:
        """Forward FLOPs of one chunk."""
        return dense_flops(chunk_size * dim, 2 * dim) + dense_flops(2 * dim, dim)
