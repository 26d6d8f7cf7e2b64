"""Every fast path beside its plain twin, in turn on the same arrays: milliseconds and their ratio.

    python -m benchmarks.kernels [--json] [--repeats 15]

The sizes are those of the tiny model (`benchmarks.throughput`). Twins are timed A B A B, and the medians compared, so that a
machine that is busy for a moment is busy for both. That the twins agree in values and gradients is what the tests hold.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm.core.cross_entropy import fused_cross_entropy, plain_cross_entropy
from calm.core.decoder import best_token
from calm.core.dense import product, product_with_transpose, weight_gradient
from calm.core.energy_head import over_samples
from calm.core.energy_score import diversity, energy_loss, plain_energy_loss
from calm.core.mlp import ResidualSwiGLU
from calm.core.posterior import Gaussian
from calm.core.stack import Stack

S, M, ROWS, Z, D, VOCABULARY = 8, 100, 1020, 64, 256, 8192
Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def cases() -> dict[str, Case]:
    """name -> (fast, plain, arguments)."""
    key = jax.random.key(0)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, sum(shape)), shape)

    samples, posterior = normal(S, ROWS, Z), Gaussian(normal(ROWS, Z), normal(ROWS, Z) * 0.1 - 1)
    hidden, table = normal(4 * ROWS, 128), normal(VOCABULARY, 128)
    targets = jax.random.randint(key, (4 * ROWS,), 0, VOCABULARY)
    weights = jnp.full((4 * ROWS,), 1 / (4 * ROWS))
    x, g = normal(S * ROWS, D).astype(jnp.bfloat16), normal(S * ROWS, 2 * D).astype(jnp.bfloat16)
    wide, kernel = normal(ROWS, D), normal(D, 4 * D)

    def plain_weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def energy(fidelity: Any) -> Callable[..., Any]:
        return jax.grad(lambda x, y: energy_loss(x, y, key, num_draws=M, fidelity=fidelity).mean())

    def all_pairs(x: jax.Array) -> jax.Array:
        return plain_energy_loss(x, x[:1])

    def fused(h: jax.Array, t: jax.Array) -> jax.Array:
        return fused_cross_entropy(h, t, targets, weights, "bfloat16", True)

    def plain(h: jax.Array, t: jax.Array) -> jax.Array:
        return (plain_cross_entropy(h, t, targets) * weights).sum()

    def plain_argmax(h: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.argmax(product_with_transpose(h.astype(jnp.bfloat16), t.astype(jnp.bfloat16)), axis=-1)

    def spread_backward(g: jax.Array, spread: Callable[..., Any]) -> jax.Array:
        return jax.vjp(spread, jnp.zeros((ROWS, 2 * D)))[1](g)[0]

    return {
        "bfloat16 product / float32": (
            lambda a, b: product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)),
            product,
            (wide, kernel),
        ),
        "weight gradient, transposed / direct": (weight_gradient, plain_weight_gradient, (x, g)),
        "gradient of a repeat over S, additions / sum": (
            lambda g: spread_backward(g, lambda x: over_samples(x, S)),
            lambda g: spread_backward(g, lambda x: jnp.broadcast_to(x, (S, *x.shape))),
            (normal(S, ROWS, 2 * D),),
        ),
        "energy gradient, shared draws / draws": (energy("shared_draws"), energy("draws"), (samples, posterior)),
        "energy gradient, second order / draws": (energy("second_order"), energy("draws"), (samples, posterior)),
        "diversity, circulant / all pairs": (
            jax.grad(lambda x: diversity(x).mean()),
            jax.grad(lambda x: all_pairs(x).mean()),
            (samples,),
        ),
        "cross-entropy and gradients, fused / plain": (
            jax.grad(fused, argnums=(0, 1)),
            jax.grad(plain, argnums=(0, 1)),
            (hidden, table),
        ),
        "argmax over V, two-level blocks / whole": (
            lambda h, t: best_token(h, t, "bfloat16"),
            plain_argmax,
            (hidden, table),
        ),
        "dispatch of 16 layers, stacked / apart": (*_dispatch(), (jnp.zeros((1, 8)),)),
    }


def _dispatch() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The Python time of one call of a compiled function of 16 small layers."""

    def layer(rngs: nnx.Rngs) -> ResidualSwiGLU:
        return ResidualSwiGLU(8, 8, precision="float32", rngs=rngs)

    stack_graph, stacked = nnx.split(Stack(layer, 16, rngs=nnx.Rngs(0)))
    parts = [nnx.split(layer(nnx.Rngs(i))) for i in range(16)]
    apart = [params for _, params in parts]

    @jax.jit
    def scan(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(stack_graph, params).scan(lambda layer, x, _: (layer(x), None), x)[0]

    @jax.jit
    def loop(params: Any, x: jax.Array) -> jax.Array:
        for (graph, _), part in zip(parts, params, strict=True):
            x = nnx.merge(graph, part)(x)
        return x

    return lambda x: scan(stacked, x), lambda x: loop(apart, x)


def milliseconds(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """One call, waited for."""
    began = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = {}
    for name, (fast, plain, operands) in cases().items():
        pair = [call if name.startswith("dispatch") else jax.jit(call) for call in (fast, plain)]
        for call in pair:
            milliseconds(call, operands)
        times = [[milliseconds(call, operands) for call in pair] for _ in range(arguments.repeats)]
        fast_ms, plain_ms = (statistics.median(column) for column in zip(*times, strict=True))
        rows[name] = {"fast_ms": fast_ms, "plain_ms": plain_ms, "ratio": plain_ms / fast_ms}
        if not arguments.json:
            print(f"{name:46s} {fast_ms:8.2f} ms {plain_ms:8.2f} ms   {plain_ms / fast_ms:5.1f} x", flush=True)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
