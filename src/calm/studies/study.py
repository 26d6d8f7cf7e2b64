"""Request to a study, and the usual study: autoencoders, language models at one budget, a table.

Whatever a study trains, it leaves each cell in a folder of its own with a `result.json` once that is done, so that the
same command continues where it was stopped.
"""

import abc
import dataclasses
import fnmatch
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from calm import config as configuration
from calm.errors import UsageError
from calm.evaluate.scores import comparison_table
from calm.runs import bundle, presets
from calm.runs.stages import AutoencoderRun, LatentLMRun
from calm.studies import catalogue
from calm.studies.runner import RESULT, Cell, cell_folder, grid, locked, run_cells
from calm.studies.scoring import (
    BRIER,
    LANGUAGE_MODEL_COLUMNS,
    WRITING_COLUMNS,
    LanguageModelScore,
    against,
    baselines_table,
    results_table,
)
from calm.text.atomic_write import write_whole

LATENT_DIMS = {1: 32, 2: 48, 4: 64, 8: 128}
LANGUAGE_MODEL_OPTIONS = frozenset(
    ("data", "budget", "grid", "precision", "split", "max_tokens", "bound_samples", "judge", "texts", "speed_tokens")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Options of `calm experiment` as a study reads them."""

    name: str
    out: Path
    """folder of the cells and of the report, `out/NAME.md`"""
    data: str | None = None
    """prepared data, for studies that read text"""
    seeds: Sequence[int] = (0,)
    """every cell is run once for each"""
    budget: float | None = None
    """training FLOPs of a cell; None = the study's own numbers of steps"""
    axes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """a grid over dotted settings (`calm.studies.runner.parse_axes`)"""
    only: Sequence[str] = ()
    """names of the cells to run, or patterns such as `recall-*`; empty = all"""
    score: LanguageModelScore = LanguageModelScore()
    """measurements on each language model"""
    model: str | None = None
    """run of a trained model, for studies of one"""
    concepts: Sequence[str] = ()
    """concepts to align the model to; empty = the study's own"""
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"experiment {self.name}: seeds must be one or more different numbers, got {tuple(self.seeds)}")

    @property
    def title(self) -> str:
        """Name and question of the study."""
        return catalogue.title(self.name)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The members of `names` that match `only`, in their order. Raises UsageError for a pattern that matches none."""
        matches = {pattern: fnmatch.filter(names, pattern) for pattern in self.only}
        if unknown := [pattern for pattern, found in matches.items() if not found]:
            raise UsageError(f"experiment {self.name}: there is no cell {unknown[0]!r}; there are: {', '.join(names)}")
        return [name for name in names if not self.only or any(name in found for found in matches.values())]

    def select(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells to run: `cells` over the grid, as far as they match `only`."""
        cells = grid(cells, self.axes)
        names = self.chosen([cell.name for cell in cells])
        return [cell for cell in cells if cell.name in names]

    def written(self, results: Sequence[dict[str, Any]], report: str) -> dict[str, Any]:
        """Writes the report to `out/NAME.md` and returns it with the results, as `Study.run` does."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / f"{self.name}.md", report + "\n")
        return {"results": list(results), "summary": report}


def cell_result(
    folder: Path, configured: Any, work: Callable[[], dict[str, Any]], log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Result of a cell that is not a run of a language model: computed by `work()` once and kept in `folder` with its
    configuration, read back afterwards. None while another process computes it.

    Raises:
        UsageError: the cell was computed with another configuration.
    """
    path, settings = folder / "config.toml", configuration.to_toml(configured)

    def finished() -> dict[str, Any] | None:
        if not (folder / RESULT).is_file():
            return None
        if path.read_text(encoding="utf-8") != settings:
            raise UsageError(f"{folder}: was run with other settings (budget, grid or study); choose another --out")
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))

    if (result := finished()) is not None:
        return result
    with locked(folder) as mine:
        if not mine:
            log(f"{folder}: another process is at it")
            return None
        if (result := finished()) is None:
            result = work()
            write_whole(path, settings)
            write_whole(folder / RESULT, json.dumps(result, indent=2) + "\n")
        return result


@dataclasses.dataclass(frozen=True)
class Place:
    """Prepared data and output folder of a study of language models."""

    data: str
    out: Path

    def autoencoder(self, chunk_size: int) -> Path:
        """The run folder of the autoencoder for K; a cell of another seed takes that seed's (`with_seed`)."""
        return self.out / f"autoencoder-k{chunk_size}" / "seed-0"


class LanguageModelStudy(abc.ABC):
    """Language models of prepared data at one budget of training FLOPs, each cell compared with the first."""

    options: ClassVar[frozenset[str]] = LANGUAGE_MODEL_OPTIONS
    chunk_sizes: ClassVar[tuple[int, ...]] = (4,)
    """K of the autoencoders that the cells use"""

    @abc.abstractmethod
    def cells(self, place: Place, budget: float | None) -> list[Cell]:
        """The cells at a budget."""

    def autoencoders(self, place: Place) -> list[Cell]:
        """The stage-1 runs that the cells use."""
        base = presets.get("quickstart").autoencoder
        return [Cell(name=f"autoencoder-k{k}", run=_autoencoder(base, place, k)) for k in self.chunk_sizes]

    def run(self, request: Request) -> dict[str, Any]:
        """Runs the cells that are missing. Every seed has an autoencoder of its own, which the budget pays for too."""
        place = Place(str(request.data), request.out)
        cells = request.select(self.cells(place, request.budget))
        needed = {cell.run.autoencoder for cell in cells if isinstance(cell.run, LatentLMRun)}
        stage_1 = [cell for cell in self.autoencoders(place) if str(cell_folder(request.out, cell.name, 0)) in needed]
        run_cells(stage_1, request.out, seeds=request.seeds, score=held_out_accuracy, log=request.log)
        results = run_cells(cells, request.out, seeds=request.seeds, score=request.score, log=request.log)
        return request.written(results, comparison(cells, results, request))


def held_out_accuracy(folder: Path) -> dict[str, Any]:
    """Score of an autoencoder's cell."""
    report = bundle.load(folder, precision="auto").evaluate(max_tokens=64 * 1024)["autoencoder"]
    return report.scalars()


def comparison(cells: Sequence[Cell], results: Sequence[dict[str, Any]], request: Request) -> str:
    """Tables of language models, and of each cell against the first."""
    if not results:
        return f"{request.title}: no cell is done yet"
    scored: Callable[[str], list[Path]] = functools.partial(_scored, request=request)
    pairs = against({cell.name: scored(cell.name) for cell in cells}, cells[0].name)
    parts = [
        f"{request.title}; {results[0]['protocol']}",
        results_table(results, LANGUAGE_MODEL_COLUMNS),
        "mean ± 95 % interval over seeds",
        baselines_table(results),
    ]
    if any("writing T=1" in result for result in results):
        parts.append(results_table([*results, _held_out(results)], WRITING_COLUMNS))
    if pairs:
        parts += [comparison_table(pairs), "paired bootstrap over the text, each cell the mean of its seeds"]
    return "\n\n".join(part for part in parts if part)


def _held_out(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for the held-out text itself, under what the cells wrote."""
    first = next(result for result in results if "writing T=1" in result)
    real = {name: {"text": first[name]["held-out text"]} for name in ("writing T=1", "writing T=.5")}
    return {"cell": "held-out text", "brier_lm": None, **real}


def _autoencoder(base: AutoencoderRun, place: Place, chunk_size: int) -> AutoencoderRun:
    model = dataclasses.replace(base.model, chunk_size=chunk_size, latent_dim=LATENT_DIMS[chunk_size])
    return dataclasses.replace(base, data=place.data, model=model)


def _scored(name: str, *, request: Request) -> list[Path]:
    folders = [cell_folder(request.out, name, seed) for seed in request.seeds]
    return [folder for folder in folders if (folder / BRIER).is_file()]
