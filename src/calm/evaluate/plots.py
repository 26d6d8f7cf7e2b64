"""Pictures of runs and scores. matplotlib is imported inside the functions and draws to files only, without a
display.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm.core.brier_lm import ORDERS
from calm.errors import UsageError
from calm.evaluate.scores import BRIER_N, AutoencoderReport, BrierReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]

# Okabe and Ito's palette, told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=144)
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. A half-written last line is left out.

    Raises:
        UsageError: no such file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Every numeric key of a `metrics.jsonl` as its steps and values.

    Raises:
        UsageError: no such file, or no line with a step.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and "step" in row:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(value))
    if not curves:
        raise UsageError(f"{path}: no line with a step and a number")
    return curves


def training_curves(runs: Mapping[str, Path] | Path, out: Path, *, names: Sequence[str] | None = None) -> None:
    """One panel for each measurement over steps, one line for each run.

    Args:
        runs: a `metrics.jsonl`, or several by name.
        out: the picture's file; its suffix decides the format.
        names: which measurements, in order; by default all that have at least two points somewhere.
    """
    files = runs if isinstance(runs, Mapping) else {"": runs}
    curves = {name: read_metrics(path) for name, path in files.items()}
    seen = list(dict.fromkeys(itertools.chain.from_iterable(curves.values())))
    lengths = {name: max(len(run[name][0]) for run in curves.values() if name in run) for name in seen}
    shown = list(names) if names else [name for name in seen if lengths[name] > 1]
    missing = [name for name in shown if name not in seen]
    if missing or not shown:
        raise UsageError(
            f"no measurement {', '.join(missing) or 'with two points'} in the metrics; there are: {', '.join(seen)}"
        )
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(3.6 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, shown, strict=False):
        for colour, (run, measured) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
            if name in measured:
                marker = "o" if len(measured[name][0]) < 30 else None
                axes.plot(*measured[name], color=colour, linewidth=1.2, marker=marker, markersize=3, label=run or None)
        _tidy(axes, name, "step", "")
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    if len(curves) > 1:
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(out)


def brier_bars(reports: Sequence[BrierReport], out: Path) -> None:
    """Brier-1..4 on a shared logarithmic-like scale, and BrierLM beside them: one bar a model, whiskers are the
    intervals.
    """
    figure = _figure(7.6, 3.2)
    panels = figure.subplots(1, 2, width_ratios=(ORDERS, 1.4))
    width = 0.8 / len(reports)
    for index, (report, colour) in enumerate(zip(reports, itertools.cycle(COLOURS), strict=False)):
        groups = [list(enumerate(report.brier_n)), [(0, report.brier_lm)]]
        for axes, group in zip(panels, groups, strict=True):
            places = [place + (index - (len(reports) - 1) / 2) * width for place, _ in group]
            values = [interval.estimate for _, interval in group]
            spans = [[max(i.estimate - i.low, 0) for _, i in group], [max(i.high - i.estimate, 0) for _, i in group]]
            axes.bar(places, values, 0.92 * width, color=colour, label=report.name)
            axes.errorbar(places, values, yerr=spans, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
    _tidy(panels[0], "Brier-n x 100, n tokens after a boundary", "", "")
    panels[0].set_xticks(range(ORDERS), BRIER_N)
    # Orders differ by factors of ten: linear near 0, where scores may be negative, logarithmic above.
    panels[0].set_yscale("symlog", linthresh=1.0)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].axhline(0, color="0.4", linewidth=0.8)
    _tidy(panels[1], "BrierLM", "", "")
    panels[1].set_xticks([])
    panels[1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(out)


def noise_curves(reports: Sequence[AutoencoderReport], out: Path) -> None:
    """Token and chunk accuracy of autoencoders against the noise on their latents; bands are the intervals."""
    figure = _figure(7.6, 3.0)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("tokens", "chunks"), strict=True):
        for colour, report in zip(itertools.cycle(COLOURS), reports, strict=False):
            sigmas = [each.sigma for each in report.noise]
            intervals = [getattr(each, part).scaled(100.0) for each in report.noise]
            axes.plot(sigmas, [i.estimate for i in intervals], color=colour, marker="o", markersize=3, label=report.name)
            axes.fill_between(sigmas, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.2, lw=0)
            axes.axvline(report.posterior_std, color=colour, linewidth=0.8, linestyle=":")
        _tidy(axes, f"{part} right", "noise, standard deviation in latent units", "% right" if part == "tokens" else "")
    panels[0].text(0.02, 0.04, "dotted: the posterior's own std", transform=panels[0].transAxes, fontsize=7, color="0.4")
    if len(reports) > 1:
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(out)
