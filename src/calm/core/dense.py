"""The one place where matrices are multiplied, so that precision is a policy and not a habit.

`float32` multiplies in float32: the reference. `bfloat16` rounds the two operands to bfloat16 and accumulates and returns
float32; weights, activations between layers and optimiser state stay float32. On processors with bfloat16 units this is about
twice as fast, and the result is never stored in bfloat16, which costs precision and, on CPU, time.

The backward pass is written out, because on CPU the weight gradient x^T g is the slow product: both operands are walked against
their layout. Asking for the transpose of x in memory first, then a plain product, measured about twice as fast
(docs/log.md). Elsewhere the compiler chooses.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from calm.errors import UsageError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def operand(x: Float[Array, "*shape"], precision: Precision) -> Float[Array, "*shape"]:
    """`x` as an operand of a product under the policy."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    return x.astype(jnp.bfloat16) if precision == "bfloat16" else x.astype(jnp.float32)


def product(a: Float[Array, "R X"], b: Float[Array, "X Y"]) -> Float[Array, "R Y"]:
    """a @ b with float32 accumulation and result, whatever the operands' type."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def product_with_transpose(a: Float[Array, "R X"], b: Float[Array, "Y X"]) -> Float[Array, "R Y"]:
    """a @ b^T with float32 accumulation and result."""
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def weight_gradient(x: Float[Array, "R X"], g: Float[Array, "R Y"]) -> Float[Array, "X Y"]:
    """x^T @ g with float32 accumulation and result; on CPU and in bfloat16 through a transpose in memory (see the module)."""
    if jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16:
        return product(with_layout_constraint(x.T, Layout((0, 1))), g)
    dimensions = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(x, g, dimensions, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "R X"], kernel: Float[Array, "X Y"], precision: Precision) -> Float[Array, "R Y"]:
    """x @ kernel under the policy; float32 in, float32 out."""
    return product(operand(x, precision), operand(kernel, precision))


def _matmul_forward(x: Array, kernel: Array, precision: Precision) -> tuple[Array, tuple[Array, Array]]:
    x, kernel = operand(x, precision), operand(kernel, precision)
    return product(x, kernel), (x, kernel)  # the operands are what the backward pass needs: half the memory in bfloat16


def _matmul_backward(precision: Precision, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    g = operand(g, precision)
    return product_with_transpose(g, kernel), weight_gradient(x, g)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nnx.Module):
    """A linear map over the last axis: `[*b X] -> [*b Y]`.

    `init_std` None draws the kernel with standard deviation 1 / sqrt(X), which keeps the scale of activations at any width. The
    published models use .02 at every width, which is right near D = 1024 and too small below.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        use_bias: bool = False,
        init_std: float | None = None,
        precision: Precision = "float32",
        rngs: nnx.Rngs,
    ):
        std = in_dim**-0.5 if init_std is None else init_std
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if use_bias else None
        self.precision = precision

    def __call__(self, x: Float[Array, "*b X"]) -> Float[Array, "*b Y"]:
        kernel = self.kernel[...]
        y = matmul(x.reshape(-1, kernel.shape[0]), kernel, self.precision).reshape(*x.shape[:-1], kernel.shape[1])
        return y if self.bias is None else y + self.bias[...]


def dense_flops(in_dim: int, out_dim: int) -> int:
    """Forward FLOPs of `Dense` for one row: a multiplication and an addition per weight."""
    return 2 * in_dim * out_dim
