"""The plainer network of the flow head: hidden state, time and latent are added up, and residual layers follow.

Hidden state and time reach every layer through the residual stream at once, where `ModulatedMLP` begins with modulations of
zero and takes thousands of steps to use them. The price is that nothing is shared by samples of one position.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Dense, Precision, dense_flops
from calm.core.mlp import ResidualSwiGLU, SwiGLU
from calm.core.stack import Stack
from calm.heads.modulated_mlp import FREQUENCIES, time_waves


class ResidualMLP(nnx.Module):
    """(latent, hidden state, time) -> `out_dim` numbers; the last map starts at zero, so a new network is zero everywhere.

    The interface is that of `ModulatedMLP`. Layers are SwiGLUs of inner width 2 D.
    """

    def __init__(
        self, dim: int, latent_dim: int, out_dim: int, num_blocks: int, *, precision: Precision = "float32", rngs: nnx.Rngs
    ):
        def dense(in_dim: int, out_dim: int, std: float | None = None) -> Dense:
            return Dense(in_dim, out_dim, use_bias=True, init_std=std, precision=precision, rngs=rngs)

        self.embed_latent = dense(latent_dim, dim)
        self.embed_hidden = dense(dim, dim)
        self.time_inner = dense(2 * FREQUENCIES, dim)
        self.time_outer = dense(dim, dim)
        self.blocks = Stack(lambda rngs: ResidualSwiGLU(dim, 2 * dim, precision=precision, rngs=rngs), num_blocks, rngs=rngs)
        self.norm_out = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.out = dense(dim, out_dim, std=0.0)

    def embed_time(self, time: Int[Array, "*t"]) -> Float[Array, "*t D"]:
        """The time's part of a condition."""
        return self.time_outer(jax.nn.silu(self.time_inner(time_waves(time))))

    def __call__(self, latents: Float[Array, "S R Z"], condition: Float[Array, "C R D"]) -> Float[Array, "S R O"]:
        """`condition` is `embed_hidden(hidden) + embed_time(time)`; C is 1 or S."""
        x, _ = self.blocks.scan(lambda block, x, _: (block(x), None), self.embed_latent(latents) + condition)
        return self.out(self.norm_out(x))

    @staticmethod
    def condition_flops(dim: int, num_blocks: int) -> int:
        """0: a condition is added."""
        return 0

    @staticmethod
    def latent_flops(dim: int, latent_dim: int, out_dim: int, num_blocks: int) -> int:
        """Forward FLOPs for one latent."""
        return dense_flops(latent_dim, dim) + num_blocks * SwiGLU.flops(dim, 2 * dim) + dense_flops(dim, out_dim)

    @staticmethod
    def time_flops(dim: int) -> int:
        """Forward FLOPs of embedding one time."""
        return dense_flops(2 * FREQUENCIES, dim) + dense_flops(dim, dim)
