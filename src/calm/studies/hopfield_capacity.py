"""How much a Hopfield memory holds: random patterns are stored, half of each is lost, and the update has to find it again.

N patterns are drawn uniformly from the sphere of radius sqrt(C) in C dimensions; a query is one of them with a random half of
its coordinates set to 0. A query is retrieved when the update leaves it within a tenth of the length of the pattern from it.
Beside every inverse temperature stands its limit, the pattern that resembles the query most (inner product): no beta can do
better at finding it.

Ramsauer et al. 2020 (arXiv:2008.02217, theorem 3) show that so many patterns can be stored as is exponential in C, for
queries that start near their pattern; here they start far from it, as a layer's do.

    python -m calm.studies.hopfield_capacity OUT
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from calm.errors import UsageError
from calm.evaluate.plots import COLOURS, _figure, _tidy
from calm.evaluate.tables import table
from calm.hybrid.hopfield import refine
from calm.rng import PRNGKey, stream
from calm.text.atomic_write import write_whole

WIDTHS = (8, 16, 24, 32, 48, 64)
COUNTS = tuple(2**power for power in range(2, 16))
BETAS = (0.125, 0.25, 0.5, 1.0, 4.0)
STEPS = (1, 5)
NEAR, WANTED = 0.1, 0.9


def draw(key: PRNGKey, count: int, width: int) -> Float[Array, "count width"]:
    """Patterns on the sphere of radius sqrt(width)."""
    normals = jax.random.normal(key, (count, width))
    return normals * (width**0.5 / jnp.linalg.norm(normals, axis=-1, keepdims=True))


def halved(key: PRNGKey, patterns: Float[Array, "Q width"]) -> Float[Array, "Q width"]:
    """Patterns of which a random half of the coordinates is 0."""
    width = patterns.shape[1]
    order = jnp.argsort(jax.random.uniform(key, patterns.shape), axis=-1)
    return jnp.where(order < width // 2, 0.0, patterns)


@partial(jax.jit, static_argnames=("count", "width", "queries", "steps"))
def retrieved(
    key: PRNGKey, beta: Float[Array, ""], *, count: int, width: int, queries: int, steps: Sequence[int]
) -> Float[Array, "_"]:
    """The share of queries that are retrieved after each of `steps` updates, and last that of the nearest pattern."""
    patterns = draw(stream(key, "patterns"), count, width)
    which = jax.random.randint(stream(key, "which"), (queries,), 0, count)
    target, state = patterns[which], halved(stream(key, "halves"), patterns[which])
    nearest = jnp.argmax(state @ patterns.T, axis=-1) == which

    def found(state: Float[Array, "Q width"]) -> Bool[Array, "Q"]:
        return jnp.linalg.norm(state - target, axis=-1) < NEAR * width**0.5

    hits = []
    for step in range(1, max(steps) + 1):
        state = refine(state, patterns, beta)
        if step in steps:
            hits.append(found(state))
    return jnp.stack([*hits, nearest]).mean(axis=-1)


def run(
    out: str | Path,
    *,
    widths: Sequence[int] = WIDTHS,
    counts: Sequence[int] = COUNTS,
    betas: Sequence[float] = BETAS,
    queries: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures every combination; writes `hopfield-capacity.json`, `.md` and `.png` into `out` and returns what they say.

    Raises:
        UsageError: a width below two, or a number below one.
    """
    if not (widths and counts and betas) or min(*widths, 2 * min(counts), 2 * queries) < 2 or not min(betas) > 0:
        raise UsageError("capacity: widths must be at least 2, counts and queries at least 1, betas above 0")
    rows = []
    for width in widths:
        for count in counts:
            key = stream(jax.random.key(seed), f"width {width}", count)
            sizes = dict(count=count, width=width, queries=queries, steps=STEPS)
            for beta in betas:
                *after, nearest = map(float, retrieved(key, jnp.float32(beta), **sizes))
                rows.append({"width": width, "count": count, "beta": beta, "after": after, "nearest": nearest})
    result = {"queries": queries, "seed": seed, "steps": list(STEPS), "near": NEAR, "rows": rows}
    result["capacity"] = capacities(rows)
    Path(out).mkdir(parents=True, exist_ok=True)
    write_whole(Path(out) / "hopfield-capacity.json", json.dumps(result, indent=1) + "\n")
    write_whole(Path(out) / "hopfield-capacity.md", capacity_table(result["capacity"], max(counts)) + "\n")
    picture(result, Path(out) / "hopfield-capacity.png")
    return result


def capacities(rows: Sequence[dict[str, Any]], wanted: float = WANTED) -> list[dict[str, Any]]:
    """For each width and inverse temperature the largest number of patterns up to which the share `wanted` is retrieved, after
    each number of updates and by the nearest pattern; 0 where the smallest number is too many already.
    """

    def largest(of: Sequence[tuple[int, float]]) -> int:
        kept = 0
        for count, share in sorted(of):
            if share < wanted:
                break
            kept = count
        return kept

    found = []
    for width, beta in dict.fromkeys((row["width"], row["beta"]) for row in rows):
        of = [row for row in rows if (row["width"], row["beta"]) == (width, beta)]
        after = [largest([(row["count"], row["after"][number]) for row in of]) for number in range(len(STEPS))]
        nearest = largest([(row["count"], row["nearest"]) for row in of])
        found.append({"width": width, "beta": beta, "after": after, "nearest": nearest})
    return found


def capacity_table(capacity: Sequence[dict[str, Any]], most: int) -> str:
    """Rows: inverse temperatures and numbers of updates; columns: widths. `most` patterns were tried, so it may be more."""

    def held(count: int) -> str:
        return f">= {count}" if count == most else str(count)

    widths = list(dict.fromkeys(entry["width"] for entry in capacity))
    betas = list(dict.fromkeys(entry["beta"] for entry in capacity))
    of = {(entry["width"], entry["beta"]): entry for entry in capacity}
    rows = []
    for beta in betas:
        for number, steps in enumerate(STEPS):
            name = f"beta {beta:g}, {steps} update" + "s" * (steps > 1)
            rows.append([name, *[held(of[width, beta]["after"][number]) for width in widths]])
    rows.append(["nearest pattern", *[held(of[width, betas[0]]["nearest"]) for width in widths]])
    return table(["patterns held", *[f"C = {width}" for width in widths]], rows, markdown=True)


def picture(result: dict[str, Any], out: Path) -> None:
    """Left: the share retrieved against the number of patterns, for each width at beta 1. Right: the number held against the
    width, for each beta; both after the last number of updates."""
    rows, capacity = result["rows"], result["capacity"]
    betas, widths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("beta", "width"))
    shown = min(betas, key=lambda beta: abs(math.log(beta)))
    figure = _figure(8.6, 3.6)
    left, right = figure.subplots(1, 2)
    for colour, width in zip(COLOURS, widths, strict=False):
        of = [row for row in rows if (row["width"], row["beta"]) == (width, shown)]
        left.plot([row["count"] for row in of], [row["after"][-1] for row in of], color=colour, label=f"C = {width}")
    left.set_xscale("log", base=2)
    _tidy(left, f"beta = {shown:g}, {STEPS[-1]} updates", "patterns stored", "share retrieved")
    for colour, beta in zip(COLOURS, betas, strict=False):
        of = [entry for entry in capacity if entry["beta"] == beta]
        held = np.array([entry["after"][-1] for entry in of], float)
        right.plot(widths, np.where(held > 0, held, np.nan), "o-", color=colour, markersize=3, label=f"beta = {beta:g}")
    best = [entry["nearest"] or np.nan for entry in capacity if entry["beta"] == betas[0]]
    right.plot(widths, best, "--", color="0.3", label="nearest pattern")
    right.set_yscale("log", base=2)
    _tidy(right, f"largest number tried of which {WANTED:.0%} are retrieved", "width C", "patterns")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Retrieval from a modern Hopfield memory against patterns, width and beta.")
    parser.add_argument("out", help="folder for hopfield-capacity.json, .md and .png")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    run(words.out, seed=words.seed)
    print((Path(words.out) / "hopfield-capacity.md").read_text())
