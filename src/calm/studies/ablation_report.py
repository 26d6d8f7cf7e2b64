"""What a hybrid loses with its paths, as csv and as a picture: retrained beside masked at inference, never mixed up."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.evaluate.plots import COLOURS, Path, _figure, _tidy

COLUMNS = ("kind", "cell", "masked", "seed", "nats")
RETRAINED, MASKED = "retrained", "masked at inference"


def ablation_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each number: kind, cell, what was masked (nothing where it was retrained), seed, nats per held-out token."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        writer.writerow((RETRAINED, result["cell"], "", result["seed"], f"{result['nats_per_token']:.6f}"))
        for what, nats in result["masked"].items():
            writer.writerow((MASKED, result["cell"], what, result["seed"], f"{nats:.6f}"))
    return lines.getvalue()


def draw_ablation(results: Sequence[Mapping[str, Any]], whole: str, described: Mapping[str, float], path: Path) -> None:
    """Left every retrained cell, right the cell `whole` with parts masked, and crosses for what the description gives for the
    same. Dots are seeds; above the dotted line, the unigram's loss, a model is worse than one that reads nothing."""
    retrained: dict[str, list[float]] = {}
    masked: dict[str, list[float]] = {}
    for result in results:
        retrained.setdefault(result["cell"], []).append(result["nats_per_token"])
        for what, nats in result["masked"].items() if result["cell"] == whole else ():
            masked.setdefault(what, []).append(nats)
    figure = _figure(11.0, 1.4 + 0.22 * max(len(retrained), len(masked)))
    panels = {f"{RETRAINED} without it": retrained, f"{whole}, {MASKED}": masked}
    for axes, (title, rows) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        _tidy(axes, title, "nats per token", "")
        for place, (name, nats) in enumerate(rows.items()):
            axes.plot(nats, np.full(len(nats), -place), "o", color=COLOURS[0], markersize=4)
            if rows is masked and name in described:
                axes.plot(described[name], -place, "x", color=COLOURS[4], markersize=5)
        axes.plot([], [], "o", color=COLOURS[0], markersize=4, label="here, one dot a seed")
        if rows is masked:
            axes.plot([], [], "x", color=COLOURS[4], markersize=5, label="described: another model and text")
        axes.axvline(results[0]["unigram_nats"], color="0.6", linewidth=1, linestyle=":", label="unigram, here")
        axes.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
