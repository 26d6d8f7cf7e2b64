"""What an autoencoder's latents are like: tables, and a picture of four panels."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import Interval
from calm.evaluate.plots import COLOURS, Path, _figure, _tidy
from calm.evaluate.tables import interval_text, table

UNITS = {
    "latent": "latent units",
    "posterior": "the posterior's own std (sigma)",
    "aggregate": "the aggregate std",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseCurve:
    """Accuracy of decoding the posterior mean plus noise, over its standard deviation in one unit."""

    unit: str
    """latent, posterior or aggregate: the last two dimension by dimension"""
    levels: list[float]
    tokens: list[Interval]
    chunks: list[Interval]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
    """What is decoded on the straight way from one chunk's latent to another's: shares of tokens, by place on the way."""

    places: list[float]
    start: list[float]
    """equal to the first chunk's token there"""
    end: list[float]
    """equal to the second's; places where both chunks have the same token are left out"""

    @property
    def foreign(self) -> list[float]:
        """Equal to neither."""
        return [max(0.0, 1 - a - b) for a, b in zip(self.start, self.end, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Distances between posterior means, per dimension in units of the aggregate standard deviation (root mean square)."""

    posterior_draw: float
    """from a mean to a draw of its posterior: what the decoder must bear"""
    one_token: float
    """to the same chunk with one token replaced by any other"""
    all_tokens: float
    """to another chunk of the text"""

    @property
    def smoothness(self) -> float:
        """one_token / all_tokens: sqrt(1/K) where every token has its own share of the latent, 1 where any change moves all."""
        return self.one_token / max(self.all_tokens, 1e-12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderInspection:
    """Everything that `calm inspect autoencoder` shows. Arrays have one entry a dimension.

    A dimension is active when its posterior mean varies over text (variance above .01), else collapsed.
    """

    name: str
    protocol: TextProtocol
    curves: list[NoiseCurve]
    sampled_tokens: Interval
    sampled_chunks: Interval
    kl: Float[np.ndarray, "Z"]
    posterior_std: Float[np.ndarray, "Z"]
    aggregate_std: Float[np.ndarray, "Z"]
    variance_of_means: Float[np.ndarray, "Z"]
    effective_rank: float
    participation_ratio: float
    interpolation: Interpolation
    neighbours: Neighbours

    @property
    def active(self) -> int:
        return int((self.variance_of_means > 0.01).sum())

    @property
    def collapsed(self) -> int:
        return len(self.kl) - self.active

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for curve, source in zip(values["curves"], self.curves, strict=True):
            curve["tokens"], curve["chunks"] = ([i.to_dict() for i in part] for part in (source.tokens, source.chunks))
        values["sampled_tokens"], values["sampled_chunks"] = self.sampled_tokens.to_dict(), self.sampled_chunks.to_dict()
        for name in ("kl", "posterior_std", "aggregate_std", "variance_of_means"):
            values[name] = getattr(self, name).tolist()
        values["neighbours"]["smoothness"] = self.neighbours.smoothness
        return values | {"active_dimensions": self.active, "collapsed_dimensions": self.collapsed}

    def table(self, *, markdown: bool = False) -> str:
        rows = []
        for curve in self.curves:
            for level, tokens, chunks in zip(curve.levels, curve.tokens, curve.chunks, strict=True):
                if level or curve is self.curves[0]:
                    label = f"mean + {level:g} x {UNITS[curve.unit]}" if level else "posterior mean"
                    rows.append([label, interval_text(tokens.scaled(100.0)), interval_text(chunks.scaled(100.0))])
        rows.insert(
            1,
            [
                "a draw of the posterior",
                interval_text(self.sampled_tokens.scaled(100.0)),
                interval_text(self.sampled_chunks.scaled(100.0)),
            ],
        )
        near, way = self.neighbours, self.interpolation
        middle = len(way.places) // 2
        facts = [
            ["dimensions", f"{len(self.kl)}: {self.active} active, {self.collapsed} collapsed"],
            ["effective rank", f"{self.effective_rank:.1f} (participation ratio {self.participation_ratio:.1f})"],
            ["KL, nats a chunk", f"{self.kl.sum():.1f}; a dimension {_spread(self.kl)}"],
            ["posterior std (sigma)", _spread(self.posterior_std)],
            ["aggregate std", _spread(self.aggregate_std)],
            ["distance, in aggregate std", f"posterior draw {near.posterior_draw:.2f}, one token changed {near.one_token:.2f}, "
             f"another chunk {near.all_tokens:.2f} (smoothness {near.smoothness:.2f})"],
            ["half way to another chunk", f"{way.start[middle]:.0%} of tokens are the first chunk's, {way.end[middle]:.0%} the "
             f"second's, {way.foreign[middle]:.0%} neither's"],
        ]  # fmt: skip
        accuracy = table(["decoded from", "tokens right %", "chunks right %"], rows, markdown=markdown)
        return "\n".join([accuracy, "", *[f"{name:<28}{value}" for name, value in facts], "", self.protocol.line()])

    def plot(self, out: Path) -> None:
        """Accuracy over noise, KL and spread by dimension, and the way from one chunk to another."""
        figure = _figure(9.6, 6.2)
        (noise, kl), (spread, way) = figure.subplots(2, 2)
        for colour, curve in zip(itertools.cycle(COLOURS), self.curves, strict=False):
            noise.plot(curve.levels, [100 * i.estimate for i in curve.tokens], color=colour, label=f"in {UNITS[curve.unit]}")
            low, high = ([100 * getattr(i, end) for i in curve.tokens] for end in ("low", "high"))
            noise.fill_between(curve.levels, low, high, color=colour, alpha=0.2, lw=0)
        noise.legend(fontsize=7, frameon=False)
        _tidy(noise, "tokens right under noise on the latent", "noise, standard deviation", "%")
        order = np.argsort(-self.kl)
        kl.bar(np.arange(len(order)), self.kl[order], width=1.0, color=COLOURS[0])
        _tidy(kl, f"KL by dimension: {self.active} active, {self.collapsed} collapsed", "dimension, sorted", "nats")
        for colour, (name, values) in zip(
            COLOURS, {"posterior (sigma)": self.posterior_std, "aggregate": self.aggregate_std}.items(), strict=False
        ):
            spread.plot(values[order], color=colour, label=name)
        spread.set_ylim(bottom=0)
        spread.legend(fontsize=7, frameon=False)
        _tidy(spread, f"standard deviations, effective rank {self.effective_rank:.1f}", "dimension, in the same order", "")
        parts = {"first chunk's": self.interpolation.start, "second chunk's": self.interpolation.end}
        for colour, (name, shares) in zip(COLOURS, (parts | {"neither's": self.interpolation.foreign}).items(), strict=False):
            way.plot(self.interpolation.places, [100 * share for share in shares], color=colour, label=name)
        way.legend(fontsize=7, frameon=False)
        _tidy(way, "tokens decoded on the straight way between two chunks", "place on the way", "%")
        figure.savefig(out)


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{values.mean():.3f} (5 % {low:.3f}, median {middle:.3f}, 95 % {high:.3f})"
