"""The frontier of accuracy and collision as it is kept, printed and drawn."""

import dataclasses
import itertools
import os
from functools import cached_property
from typing import Any

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.evaluate.plots import COLOURS, _figure, _tidy
from calm.evaluate.tables import interval_text, table

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
    """What `calm.evaluate.frontier` measured.

    Attributes:
        scores: for each block, 2 K + 1 numbers for every temperature and size (`calm.evaluate.sampling_frontier`).
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
    figure = _figure(3.9 * len(orders), 3.8)
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
        _tidy(axes, name, "collision rate, %", "accuracy, %" if order == 1 else "")
    for temperature, mark in zip(report.temperatures, itertools.cycle(MARKS), strict=False):
        panels[0].plot([], [], mark, color="0.4", markersize=5, label=f"T = {temperature}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(out)
