"""What a router between two models gives at every threshold, as it is kept, printed and drawn."""

import dataclasses
import os
from typing import Any

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import Interval
from calm.evaluate.plots import COLOURS, _figure, _tidy
from calm.evaluate.tables import interval_text, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingPoint:
    """One threshold."""

    asked: float
    """share of chunks that the token model was to write"""
    threshold: float
    share: float
    """that it did write"""
    nats: Interval
    """per token"""
    gain: Interval
    """nats per token below a coin of the same share"""
    coin_nats: float
    oracle_nats: float
    brier_lm: Interval
    coin_brier_lm: float
    """of the coin, from its mean Brier-1..4"""
    flops: float
    """per token"""
    steps: float
    """passes through a model, one after the other, per token"""

    def to_dict(self) -> dict[str, Any]:
        intervals = {name: getattr(self, name).to_dict() for name in ("nats", "gain", "brier_lm")}
        return dataclasses.asdict(self) | intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """What `calm.dual.router_training.measure_routing` found.

    Attributes:
        correlation: of the gap foretold and the gap found, over chunks.
        measure: the error whose gap the router foretells.
    """

    name: str
    protocol: TextProtocol
    measure: str
    points: tuple[RoutingPoint, ...]
    correlation: float

    def table(self) -> str:
        """A line for each threshold."""
        header = ["token %", "MFLOPs/token", "steps/token", "nats/token", "coin", "oracle", "below coin", "BrierLM", "coin"]
        rows = [
            [
                f"{100 * point.share:.1f}",
                f"{point.flops / 1e6:.2f}",
                f"{point.steps:.2f}",
                interval_text(point.nats, 3),
                f"{point.coin_nats:.3f}",
                f"{point.oracle_nats:.3f}",
                interval_text(point.gain, 3),
                interval_text(point.brier_lm),
                f"{point.coin_brier_lm:.2f}",
            ]
            for point in self.points
        ]
        line = f"{self.protocol.line()}; correlation of the foretold and the true gap in {self.measure} {self.correlation:.3f}"
        return table(header, rows) + "\n" + line

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "protocol": self.protocol.to_dict(),
            "measure": self.measure,
            "correlation": self.correlation,
            "points": [point.to_dict() for point in self.points],
        }


def routing_curves(report: RoutingReport, out: str | os.PathLike[str]) -> None:
    """Nats per token over FLOPs and over steps per token: the router, a coin, an oracle."""
    figure = _figure(8.4, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, scale) in zip(panels, (("flops", 1e-6), ("steps", 1.0)), strict=True):
        points = sorted(report.points, key=lambda point: point.share)
        x = [scale * getattr(point, name) for point in points]
        nats = [point.nats for point in points]
        spans = [[max(i.estimate - i.low, 0) for i in nats], [max(i.high - i.estimate, 0) for i in nats]]
        axes.errorbar(
            x,
            [i.estimate for i in nats],
            yerr=spans,
            color=COLOURS[0],
            marker="o",
            markersize=3,
            elinewidth=0.4,
            label="router",
        )
        axes.plot(x, [point.coin_nats for point in points], color=COLOURS[1], linestyle="--", label="coin")
        axes.plot(x, [point.oracle_nats for point in points], color=COLOURS[2], linestyle=":", label="oracle")
        label = "MFLOPs per token" if name == "flops" else "steps per token"
        _tidy(axes, "", label, "nats per token" if name == "flops" else "")
    panels[1].legend(fontsize=8, frameon=False)
    figure.savefig(out)
