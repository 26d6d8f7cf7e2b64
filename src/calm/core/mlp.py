"""Position-wise multilayer perceptrons."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision, dense_flops


class SwiGLU(nnx.Module):
    """W_down(SiLU(x W_gate) * (x W_up)), without biases (Shazeer 2020, arXiv:2002.05202).

    Gate and up share one product: `gate_up` holds the gate's columns first.
    """

    def __init__(self, dim: int, inner_dim: int, *, init_std: float | None = None, precision: Precision, rngs: nnx.Rngs):
        self.gate_up = Dense(dim, 2 * inner_dim, init_std=init_std, precision=precision, rngs=rngs)
        self.down = Dense(inner_dim, dim, init_std=init_std, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)

    @staticmethod
    def parameters(dim: int, inner_dim: int) -> int:
        """Number of weights."""
        return 3 * dim * inner_dim

    @staticmethod
    def flops(dim: int, inner_dim: int) -> int:
        """Forward FLOPs of one row."""
        return dense_flops(dim, 2 * inner_dim) + dense_flops(inner_dim, dim)


class ResidualSwiGLU(nnx.Module):
    """x + SwiGLU(RMSNorm(x)): the layer of the autoencoder (CALM)."""

    def __init__(self, dim: int, inner_dim: int, *, init_std: float | None = None, precision: Precision, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.mlp = SwiGLU(dim, inner_dim, init_std=init_std, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return x + self.mlp(self.norm(x))
