"""K token embeddings to the law of their latent."""

from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision
from calm.core.mlp import ResidualSwiGLU
from calm.core.posterior import POSTERIORS, Posterior, PosteriorKind
from calm.core.stack import Stack


class Encoder(nnx.Module):
    """Token layers at each of the K places, flatten, K*D -> D, chunk layers, norm, D -> the posterior's numbers (CALM)."""

    def __init__(
        self,
        *,
        chunk_size: int,
        latent_dim: int,
        posterior: PosteriorKind,
        dim: int,
        inner_dim: int,
        layers_per_stage: int,
        init_std: float | None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        def layer(rngs: nnx.Rngs) -> ResidualSwiGLU:
            return ResidualSwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

        def dense(in_dim: int, out_dim: int) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=init_std, precision=precision, rngs=rngs)

        self.token_layers = Stack(layer, layers_per_stage, rngs=rngs)
        self.squeeze = dense(chunk_size * dim, dim)
        self.chunk_layers = Stack(layer, layers_per_stage, rngs=rngs)
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.posterior = posterior
        self.to_latent = dense(dim, POSTERIORS[posterior].outputs(latent_dim))

    def __call__(self, embedded: Float[Array, "*b K D"]) -> Posterior:
        hidden = apply_layers(self.token_layers, embedded)
        hidden = self.squeeze(hidden.reshape(*hidden.shape[:-2], -1))
        hidden = self.norm(apply_layers(self.chunk_layers, hidden))
        return POSTERIORS[self.posterior].of(self.to_latent(hidden))


def apply_layers(layers: Stack, hidden: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """The stacked residual layers, one after the other."""
    return layers.scan(lambda layer, hidden, _: (layer(hidden), None), hidden)[0]
