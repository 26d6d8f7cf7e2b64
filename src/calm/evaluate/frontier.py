"""Accuracy against collision over temperatures and numbers of candidates of the batch sampler, on held-out text.

The picture by which CALM (arXiv:2510.27688) compares temperatures and numbers of candidates. At a position of real text,
accuracy is the probability that the chosen chunk is the true one, and the collision rate that two independent choices agree.
Brier = 2 accuracy - collision rate. Lower temperatures move a model up and to the right; a better model, or a better sampler,
is higher at the same collision rate.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.chunk_decoder import DECODINGS, recent_tokens
from calm.core.counts import tally
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.core.predictor import Predictor, sample_chunks
from calm.core.temperature import BatchTemperature, exact_temperature, falls_back, log_weights
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.plots import COLOURS, new_figure, tidy
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, stream

MARKS = "os^Dv*PX<>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One temperature and number of candidates. Accuracy and collision rate of the first 1..K tokens of a chunk, in percent."""

    temperature: str
    candidates: int
    accuracy: tuple[Interval, ...]
    collision: tuple[Interval, ...]
    fallback_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierReport:
    """Accuracy and collision rate for every temperature and number of candidates.

    Attributes:
        scores: for each block, 2 K + 1 numbers for every temperature and size, as `frontier` gives them.
        decoding: how latents became tokens.
    """

    name: str
    protocol: TextProtocol
    temperatures: tuple[str, ...]
    sizes: tuple[int, ...]
    scores: BlockSums
    decoding: str

    @cached_property
    def points(self) -> tuple[FrontierPoint, ...]:
        width = self.protocol.chunk_size
        intervals = bootstrap(self.scores, [lambda means, i=i: means[..., i] for i in range(self.scores.total.shape[1])])
        points = []
        for number, (temperature, size) in enumerate(itertools.product(self.temperatures, self.sizes)):
            own = intervals[number * (2 * width + 1) : (number + 1) * (2 * width + 1)]
            percent = [interval.scaled(100.0) for interval in own[:-1]]
            points.append(
                FrontierPoint(
                    temperature=temperature,
                    candidates=size,
                    accuracy=tuple(percent[:width]),
                    collision=tuple(percent[width:]),
                    fallback_share=own[-1].estimate,
                )
            )
        return tuple(points)

    def table(self) -> str:
        """Accuracy and collision rate of the first token and of the whole chunk."""
        orders = dict.fromkeys((1, self.protocol.chunk_size))
        header = ["T", "candidates"]
        for order in orders:
            header += [f"accuracy-{order} %", f"collision-{order} %"]
        rows = []
        for point in self.points:
            cells = [point.temperature, str(point.candidates)]
            for order in orders:
                cells += [interval_text(point.accuracy[order - 1]), interval_text(point.collision[order - 1])]
            rows.append([*cells, f"{100 * point.fallback_share:.1f}"])
        return table([*header, "fallback %"], rows)

    def to_dict(self) -> dict[str, Any]:
        points = [
            dataclasses.asdict(point)
            | {name: [interval.to_dict() for interval in getattr(point, name)] for name in ("accuracy", "collision")}
            for point in self.points
        ]
        positions = int(self.scores.count.sum())
        protocol = {**self.protocol.to_dict(), "decoding": self.decoding, "positions": positions}
        return {"name": self.name, "protocol": protocol, "points": points}


def frontier_curves(report: FrontierReport, out: str | os.PathLike[str]) -> None:
    """One panel for the first token and one for the whole chunk: a line for each number of candidates, a mark for each T."""
    orders = list(dict.fromkeys((1, report.protocol.chunk_size)))
    figure = new_figure(3.9 * len(orders), 3.8)
    panels = figure.subplots(1, len(orders), squeeze=False)[0]
    for axes, order in zip(panels, orders, strict=True):
        for colour, size in zip(itertools.cycle(COLOURS), report.sizes, strict=False):
            points = [point for point in report.points if point.candidates == size]
            x = [point.collision[order - 1].estimate for point in points]
            y = [point.accuracy[order - 1] for point in points]
            spans = [[max(i.estimate - i.low, 0) for i in y], [max(i.high - i.estimate, 0) for i in y]]
            middle = [i.estimate for i in y]
            axes.errorbar(x, middle, yerr=spans, color=colour, linewidth=1, elinewidth=0.4, label=f"S = {size}")
            for across, up, mark in zip(x, middle, itertools.cycle(MARKS), strict=False):
                axes.plot([across], [up], mark, color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5)
        name = "first token" if order == 1 else f"chunk of {order} tokens"
        tidy(axes, name, "collision rate, %", "accuracy, %" if order == 1 else "")
    for temperature, mark in zip(report.temperatures, itertools.cycle(MARKS), strict=False):
        panels[0].plot([], [], mark, color="0.4", markersize=5, label=f"T = {temperature}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(out)


def frontier(
    pools: Int[Array, "2 S K"], truth: Int[Array, "K"], temperatures: Sequence[Fraction], sizes: Sequence[int]
) -> Float[Array, "X A F"]:
    """The batch sampler at one position, for X temperatures and A numbers of candidates, from the same draws.

    Args:
        pools: two independent sets of S draws; a sampler of fewer candidates takes the first ones.
        truth: the true chunk.
    Returns:
        F = 2 K + 1 numbers: accuracy of the first 1..K tokens, their collision rates, and the share of fallbacks. They are
        expectations over the sampler's choice given the draws, not single choices: unbiased, and less noisy.
    """
    width = truth.shape[0]
    right = jnp.cumprod(pools == truth, axis=-1).astype(jnp.float32)  # [2 S K]: the first n tokens are those of the text
    alike = jnp.cumprod(pools[0][:, None] == pools[1][None], axis=-1).astype(jnp.float32)  # [S S K]
    found = []
    for size in sizes:
        counts = jax.vmap(tally)(pools[:, :size])
        for temperature in temperatures:
            weights = jax.nn.softmax(log_weights(counts, temperature, size), axis=-1)
            accuracy = jnp.einsum("ps,psk->k", weights, right[:, :size]) / 2
            collision = jnp.einsum("s,t,stk->k", weights[0], weights[1], alike[:size, :size])
            fallback = falls_back(counts, temperature).mean(dtype=jnp.float32)
            found.append(jnp.concatenate([accuracy, collision, fallback[None]]))
    return jnp.stack(found).reshape(len(sizes), len(temperatures), 2 * width + 1).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Temperatures and numbers of candidates to sweep, and the positions to sweep them at."""

    temperatures: tuple[str, ...] = ("1", "0.7", "1/2", "1/3", "1/4", "1/8")
    """T, each above 0"""
    sizes: tuple[int, ...] = (10, 50, 200)
    """S, candidates of the batch sampler"""
    positions: int = 32
    """chunks of every block that are predicted, evenly spread over it"""
    decoding: str = "argmax"

    def __post_init__(self) -> None:
        if not self.temperatures or not self.sizes or self.positions < 1:
            raise UsageError("frontier: needs at least one temperature, one number of candidates and one position")
        if self.decoding not in DECODINGS:
            raise UsageError(f"unknown decoding {self.decoding!r}; choose {' or '.join(DECODINGS)}")
        for temperature in self.fractions:  # each pair must be a sampler
            BatchTemperature(temperature=temperature, num_candidates=min(self.sizes))

    @property
    def fractions(self) -> tuple[Fraction, ...]:
        return tuple(exact_temperature(temperature) for temperature in self.temperatures)


@partial(jax.jit, static_argnames=("graph", "options"))
def _score(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey, *, options: FrontierOptions
) -> Float[Array, "B F"]:
    """Sums over the positions of every block."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    places = np.unique(np.linspace(0, targets.shape[1] - 1, options.positions).astype(int))
    most = max(options.sizes)

    def position(each: tuple[Array, ...]) -> Float[Array, "F"]:
        row, place, hidden, previous, truth = each
        of_position = jax.random.fold_in(jax.random.fold_in(key, row), place)
        draws = sample_chunks(predictor, of_position, hidden[None], previous[None], 2 * most, decoding=options.decoding)
        return frontier(draws.reshape(2, most, -1), truth, options.fractions, options.sizes).reshape(-1)

    shape = (len(tokens), len(places))
    of_each = (
        jnp.broadcast_to(rows[:, None], shape),
        jnp.broadcast_to(jnp.asarray(places), shape),
        *(x[:, places] for x in (hidden, previous, targets)),
    )
    scores = jax.lax.map(position, jax.tree.map(lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:]), of_each))
    return scores.reshape(*shape, -1).sum(1)


def measure_frontier(
    predictor: Predictor,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    options: FrontierOptions | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> FrontierReport:
    """Draws twice the largest number of candidates at some positions of every block, after the true text before them.

    All temperatures and numbers of candidates share these draws, so their differences are less noisy than each of them.

    Raises:
        UsageError: blocks that do not fit the model.
    """
    options = options or FrontierOptions()
    text = checked(blocks, document, predictor.chunk_size, text)
    graph, params = nnx.split(predictor)
    key = stream(key, "frontier")
    totals, _ = run_blocks(lambda tokens, rows: _score(graph, params, tokens, rows, key, options=options), blocks, None)
    places = min(options.positions, blocks.shape[1] // predictor.chunk_size - 1)
    return FrontierReport(
        name=name,
        protocol=text,
        temperatures=options.temperatures,
        sizes=options.sizes,
        scores=sums_of(totals, places, document, blocks.shape[1]),
        decoding=options.decoding,
    )
