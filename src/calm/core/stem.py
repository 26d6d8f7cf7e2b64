"""Stems: from a chunk to the input of the backbone."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops

Reads = Literal["discrete", "continuous", "both"]


class ChunkCompression(nnx.Module):
    """What is read of a chunk to one vector: X -> 2D, SiLU, 2D -> D, LayerNorm (CALM).

    `reads` says what X is: the embeddings of the chunk's K tokens ("discrete"), its latent ("continuous") or both, one after
    the other. The latent is the mean of the frozen encoder's posterior of the chunk, in training as in generation, where the
    sampled latent is decoded first and its chunk comes back in here. So the model's state depends on tokens alone, whatever
    it reads, and any sampler can choose the chunk. (The sampled latent itself would be another input than in training, and
    stands for its chunk no longer once a sampler has picked by votes or a token was banned.) In the paper's ablation tokens
    alone are best.
    """

    def __init__(
        self,
        vocab_size: int,
        chunk_size: int,
        dim: int,
        *,
        reads: Reads = "discrete",
        latent_dim: int = 0,
        init_std: float | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.reads_tokens, self.reads_latents = reads != "continuous", reads != "discrete"
        # A linear map follows, so the scale matters little; rows of about unit length are the fan-in of one token.
        std, shape = dim**-0.5 if init_std is None else init_std, (vocab_size, dim)
        table = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32)) if self.reads_tokens else None
        self.embedding = table
        sizes = dict(use_bias=True, init_std=init_std, precision=precision, rngs=rngs)
        self.widen = Dense(self.inputs(chunk_size, dim, latent_dim, reads), 2 * dim, **sizes)
        self.narrow = Dense(2 * dim, dim, **sizes)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)

    def __call__(
        self,
        chunks: Int[Array, "*b K"],
        latents: Float[Array, "*b Z"] | None = None,
        embedded: Float[Array, "*b K D"] | None = None,
    ) -> Float[Array, "*b D"]:
        """`latents` are needed where they are read, and not looked at where they are not; `embedded` may stand for the
        embeddings of the chunks' tokens."""
        parts = []
        if self.embedding is not None:
            rows = self.embedding[...][chunks] if embedded is None else embedded
            parts.append(rows.reshape(*chunks.shape[:-1], -1))
        if self.reads_latents:
            assert latents is not None, "this stem reads latents"
            parts.append(latents * latents.shape[-1] ** -0.5)  # about as long as an embedding
        hidden = self.widen(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1))
        return self.norm(self.narrow(jax.nn.silu(hidden)))

    @staticmethod
    def inputs(chunk_size: int, dim: int, latent_dim: int, reads: Reads) -> int:
        """Width X of what is read."""
        return (reads != "continuous") * chunk_size * dim + (reads != "discrete") * latent_dim

    @staticmethod
    def flops(chunk_size: int, dim: int, latent_dim: int = 0, reads: Reads = "discrete") -> int:
        """Forward FLOPs of one chunk, the encoder that makes its latent apart."""
        width = ChunkCompression.inputs(chunk_size, dim, latent_dim, reads)
        return dense_flops(width, 2 * dim) + dense_flops(2 * dim, dim)
