"""Which of two models writes the next chunk: CALM in one step, or a token model in K.

The router reads what CALM's backbone makes of the text and foretells how much worse CALM will do on the chunk that comes, by an
error measured on training text (`calm.dual.router_training`). Above a threshold the token model writes. It is the
latent-or-token router that the plans for a dual model announce; learning to defer to a second model is as old as Madras et al. 2018
(arXiv:1711.06664), here as a regression of the difference, so that one router serves every threshold.
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Dense, Precision, dense_flops
from calm.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """A perceptron with one hidden layer."""

    dim: int
    """width D of CALM's hidden state"""
    inner_dim: int = 64

    def __post_init__(self) -> None:
        if min(self.dim, self.inner_dim) < 1:
            raise UsageError("router: dim and inner_dim must be at least 1")

    def build(self, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Router":
        return Router(self, rngs=rngs, precision=precision)

    def flops(self) -> int:
        """Forward FLOPs of one chunk."""
        return dense_flops(self.dim, self.inner_dim) + dense_flops(self.inner_dim, 1)


class Router(nnx.Module):
    """Hidden state to the gap that is expected: CALM's error on the next chunk minus the token model's."""

    def __init__(self, config: RouterConfig, *, rngs: nnx.Rngs, precision: Precision = "float32"):
        self.config = config
        self.inner = Dense(config.dim, config.inner_dim, use_bias=True, precision=precision, rngs=rngs)
        self.out = Dense(config.inner_dim, 1, use_bias=True, init_std=0.0, precision=precision, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        return self.out(jax.nn.silu(self.inner(hidden)))[..., 0]
