"""What a recurrence costs in training: a state of its own per channel against one decay per head in chunks of products.

    python -m benchmarks.scans [--repeats 7] [--only scans mixers hybrids]

Milliseconds of processor time (not of the clock: other work on the machine changes it less), the smallest of the repeats, for
values and all gradients of 4 rows of 512 positions at D = 256. Pin it to one core: `taskset -c 1 python -m benchmarks.scans`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.core.dense import product
from calm.core.mixer import Window
from calm.hybrid.scans import linear_scan, plain_selective_scan, selective_scan
from calm.hybrid.state_space import SSMConfig

B, N, D, HEADS = 4, 512, 256, 8


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def milliseconds(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Processor time of one call."""
    call, times = jax.jit(call), []
    for _ in range(repeats + 1):
        began = time.process_time()
        jax.block_until_ready(call(*arguments))
        times.append(1e3 * (time.process_time() - began))
    return min(times[1:])


def trained(run: Callable[..., jax.Array], arguments: tuple[Any, ...], repeats: int) -> str:
    """Columns: values, values and gradients."""
    slope = jax.grad(lambda *z: (run(*z) ** 2).sum(), tuple(range(len(arguments))))
    return f"{milliseconds(run, arguments, repeats):.1f} | {milliseconds(slope, arguments, repeats):.1f}"


def per_channel(x: jax.Array, step: jax.Array, rate: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Mamba's scan: decay exp(-step_t * rate), one rate for each of I x X numbers; the states are not kept."""

    def forward(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, step, b, c = now
        state = jnp.exp(-step[..., None] * rate) * state + (step * x)[..., None] * b[:, None]
        return state, (state * c[:, None]).sum(-1)

    along = tuple(z.swapaxes(0, 1) for z in (x, step, b, c))
    return jax.lax.scan(forward, jnp.zeros((x.shape[0], *rate.shape)), along)[1].swapaxes(0, 1)


def scans(repeats: int) -> None:
    inner = 2 * D
    print("| scan, inner width 512 | X | values | and gradients |\n|---|---|---|---|")
    for states in (16, 32, 64):
        b, c = normal(B, N, states) / states**0.5, normal(B, N, states)
        x, decay = normal(B, N, HEADS, inner // HEADS), -jax.nn.softplus(normal(B, N, HEADS) - 2)
        if states == 16:
            steps, rate = jax.nn.softplus(normal(B, N, inner) - 3), jnp.exp(normal(inner, states))
            arguments = (x.reshape(B, N, inner), steps, rate, b, c)
            print(f"| a decay for every number | {states} | {trained(per_channel, arguments, repeats)} |", flush=True)
            wide = jax.nn.sigmoid(normal(N, B, inner))
            for method in ("sequential", "associative"):
                run = trained(
                    lambda a, z, method=method: linear_scan(a, z, method=method), (wide, normal(N, B, inner)), repeats
                )
                print(f"| one number a channel, {method} | 1 | {run} |", flush=True)
            run = trained(lambda *z: plain_selective_scan(*z)[0], (x, decay, b, c), repeats)
            print(f"| a decay a head, every state formed | {states} | {run} |", flush=True)
        for chunk in (16, 32, 64, 128):
            run = trained(lambda *z, chunk=chunk: selective_scan(*z, chunk=chunk)[0], (x, decay, b, c), repeats)
            print(f"| a decay a head, chunks of {chunk} | {states} | {run} |", flush=True)


def rate_of(flops: int, spent: str, precision: str) -> str:
    """GFLOP/s of a training step, and its share of the rate of one large product."""
    a, b = normal(B * N, D).astype(precision), normal(D, 4 * D).astype(precision)
    peak = 2 * B * N * D * 4 * D / milliseconds(product, (a, b), 15) / 1e6
    reached = 3 * flops * B * N / float(spent.rsplit(" ", 1)[1]) / 1e6
    return f"{reached:.0f} | {reached / peak:.0%}"


def mixers(repeats: int) -> None:
    """One mixer of each letter alone."""
    print("\n| mixer | operands | values | and gradients | GFLOP/s | of a product's |\n|---|---|---|---|---|---|")
    config, at = BackboneConfig(dim=D), Window(jnp.int32(0), jnp.zeros((B,), jnp.int32))
    known = {letter: config.mixer(letter) for letter in "ACHGS"}
    known |= {f"S, X = {states}": SSMConfig(state_dim=states) for states in (16, 64)}
    for name, of_letter in known.items():
        for precision in ("float32", "bfloat16"):
            graph, weights = nnx.split(of_letter.build(D, rngs=nnx.Rngs(0), precision=precision))
            spent = trained(lambda w, x, graph=graph: nnx.merge(graph, w)(x, None, at)[0], (weights, normal(B, N, D)), repeats)
            print(f"| {name} | {precision} | {spent} | {rate_of(of_letter.flops(D, N), spent, precision)} |", flush=True)


def hybrids(repeats: int) -> None:
    """Two layers of a backbone, SwiGLU and norms included."""
    print("\n| pattern, 2 layers | operands | values | and gradients | GFLOP/s | of a product's |\n|---|---|---|---|---|---|")
    for pattern in ("A", "S", "SHA", "C,H"):
        for precision in ("float32", "bfloat16"):
            config = BackboneConfig(dim=D, num_layers=2, pattern=pattern)
            graph, weights = nnx.split(config.build(rngs=nnx.Rngs(0), precision=precision))
            spent = trained(lambda w, x, graph=graph: nnx.merge(graph, w)(x)[0], (weights, normal(B, N, D)), repeats)
            print(f"| {pattern} | {precision} | {spent} | {rate_of(config.flops(N), spent, precision)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=("scans", "mixers", "hybrids"), default=("scans", "mixers", "hybrids"))
    arguments = parser.parse_args()
    for table in (scans, mixers, hybrids):
        if table.__name__ in arguments.only:
            table(arguments.repeats)


if __name__ == "__main__":
    main()
