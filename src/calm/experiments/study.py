"""A whole study: its autoencoders, its cells, its table."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calm import bundle
from calm.experiments import studies
from calm.experiments.runner import Cell, cell_folder, grid, run_cells
from calm.experiments.scoring import BRIER, LANGUAGE_MODEL_COLUMNS, LanguageModelScore, against, results_table
from calm.report.scores import comparison_table
from calm.text.writer import write_whole


def run_study(
    name: str,
    data: str,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    budget: float | None = None,
    axes: dict[str, list[str]] | None = None,
    only: Sequence[str] = (),
    score: LanguageModelScore | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is missing of a study and writes `OUT/NAME.md`; returns the results and that text.

    Args:
        seeds: every cell is run once for each; autoencoders with the first seed alone, which all cells share.
        budget: training FLOPs of a cell, its autoencoder's among them; None = the presets' numbers of steps.
        axes: a grid over dotted settings (`calm.experiments.runner.parse_axes`).
        only: names of the cells to run; empty = all.
    """
    study, place = studies.get(name), studies.Place(str(data), Path(out))
    run_cells(studies.autoencoders(study, place), out, seeds=(0,), score=held_out_accuracy, say=say)
    cells = grid(study.cells(place, budget), axes or {})
    cells = [cell for cell in cells if not only or cell.name in only]
    results = run_cells(cells, out, seeds=seeds, score=score or LanguageModelScore(), say=say)
    text = summary(name, study, cells, results, place.out, seeds)
    write_whole(place.out / f"{name}.md", text + "\n")
    return {"results": results, "summary": text}


def held_out_accuracy(folder: Path) -> dict[str, Any]:
    """The score of an autoencoder's cell."""
    report = bundle.load(folder, precision="auto").evaluate(max_tokens=64 * 1024)["autoencoder"]
    return report.scalars()


def summary(
    name: str,
    study: studies.Study,
    cells: Sequence[Cell],
    results: Sequence[dict[str, Any]],
    out: Path,
    seeds: Sequence[int],
) -> str:
    """The table of a study, and each cell against its first one."""
    if not results:
        return f"{name}: no cell is done yet"
    done: Callable[[str], list[Path]] = functools.partial(_scored, out=out, seeds=seeds)
    pairs = against({cell.name: done(cell.name) for cell in cells}, cells[0].name)
    parts = [
        f"{name}: {study.summary}; {results[0]['protocol']}",
        results_table(results, LANGUAGE_MODEL_COLUMNS),
        "mean ± 95 % interval over seeds",
    ]
    if pairs:
        parts += [comparison_table(pairs), "paired bootstrap over the text, each cell the mean of its seeds"]
    return "\n\n".join(parts)


def _scored(name: str, *, out: Path, seeds: Sequence[int]) -> list[Path]:
    folders = [cell_folder(out, name, seed) for seed in seeds]
    return [folder for folder in folders if (folder / BRIER).is_file()]
