"""What a step costs, and how large the state is, when much has been read: patterns with attention and without.

python benchmarks/long_context.py         # the table and the picture of docs/backbones.md; half a minute of one core

One row, a backbone of width 64 and two layers with its layers taken apart as for generation. The state is made for a context of
so many positions and the step measured is that of the last one, so nothing has to be read first.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

CONTEXTS = (1024, 4096, 16_384, 65_536)
PATTERNS = ("S", "C", "C,H", "A")
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "long-context.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument(
        "--steps", type=int, default=50, help="timed steps; the fastest counts, since other work on the machine can only add"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    found = {pattern: [measure(pattern, context, options.steps) for context in options.contexts] for pattern in PATTERNS}
    names = [f"{context:,}" for context in options.contexts]
    print(f"| pattern | what | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for pattern, rows in found.items():
        print(f"| {pattern} | microseconds a step | " + " | ".join(f"{1e6 * seconds:,.0f}" for seconds, _ in rows) + " |")
        print(f"| {pattern} | KiB of state | " + " | ".join(f"{size / 1024:,.1f}" for _, size in rows) + " |")
    draw(options.contexts, found, options.picture)


@functools.cache
def built(pattern: str) -> tuple[Any, Any]:
    """The configuration and a new model of it."""
    from flax import nnx

    from calm.core.backbone import BackboneConfig

    config = BackboneConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=4, inner_dim=172, pattern=pattern)
    return config, nnx.jit(lambda: config.build(rngs=nnx.Rngs(0)))()


def measure(pattern: str, context: int, steps: int) -> tuple[float, int]:
    """Least seconds of the step at the last position of `context`, and bytes of the state."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from calm.core.unrolled import unrolled, unstack

    config, stacked = built(pattern)
    state = stacked.init_state(1, context)
    state = state._replace(layers=unstack(state.layers, config.num_periods))
    size = sum(x.nbytes for x in jax.tree.leaves(state.layers))
    graphdef, weights = nnx.split(unrolled(stacked))

    def step(weights: Any, hidden: Any, state: Any) -> Any:
        window = state.window._replace(offset=jnp.int32(context - 1))
        return nnx.merge(graphdef, weights)(hidden, state._replace(window=window))

    compiled = jax.jit(step, donate_argnums=2)
    hidden, taken = jnp.ones((1, 1, config.dim)), []
    for _ in range(steps + 5):
        begin = time.perf_counter()
        _, state = jax.block_until_ready(compiled(weights, hidden, state))
        taken.append(time.perf_counter() - begin)
    return min(taken[5:]), size


def draw(contexts: list[int], found: dict[str, list[tuple[float, int]]], path: Path) -> None:
    """Both quantities over the context, in logarithms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from calm.evaluate.plots import COLOURS

    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=144)
    FigureCanvasAgg(figure)
    for axes, which, title in zip(figure.subplots(1, 2), (0, 1), ("Milliseconds a step", "KiB of state"), strict=True):
        for (pattern, rows), colour, marker in zip(found.items(), COLOURS, "os^D", strict=False):
            scale = (1e3, 1 / 1024)[which]
            axes.plot(contexts, [scale * row[which] for row in rows], color=colour, marker=marker, label=pattern)
        axes.set(xscale="log", yscale="log", xlabel="positions read")
        axes.set_xticks(contexts, [f"{context // 1024} k" for context in contexts], minor=False)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
