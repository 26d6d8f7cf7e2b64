"""An auxiliary predictor of the next chunk's tokens from the hidden state: a training signal, absent at inference."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.cross_entropy import fused_cross_entropy
from calm.core.dense import Dense, Precision


class ChunkPredictor(nnx.Module):
    """K independent token distributions from one hidden state, scored against the frozen autoencoder's table.

    At small scale the energy loss alone leaves the backbone near the marginal distribution: its gradient about *which* chunk
    comes is weak. Cross-entropy through a projection to K slots of the autoencoder's width gives that gradient directly
    (docs/log.md has the measurements). Not in the paper.
    """

    def __init__(self, dim: int, chunk_size: int, table_dim: int, *, precision: Precision = "float32", rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.project = Dense(dim, chunk_size * table_dim, precision=precision, rngs=rngs)
        self.table_dim, self.precision = table_dim, precision

    def loss(
        self,
        hidden: Float[Array, "*b D"],
        chunks: Int[Array, "*b K"],
        table: Float[Array, "V W"],
        weights: Float[Array, "*b"],
    ) -> Float[Array, ""]:
        """Cross-entropy in nats per token, added up over chunks by `weights`."""
        slots = self.project(self.norm(hidden)).reshape(-1, self.table_dim)
        of_token = jnp.repeat(weights.reshape(-1) / chunks.shape[-1], chunks.shape[-1])
        return fused_cross_entropy(slots, table, chunks.reshape(-1), of_token, self.precision, False)
