"""What a study is, and the usual one: autoencoders, language models at one budget, a table.

A study answers a question with many short runs. It is an object with `run(Request)`; whatever it trains, it leaves each cell in
a folder of its own with a `result.json` when that is done, so that the same command goes on where it was stopped.
"""

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from calm import config as configuration
from calm.errors import UsageError
from calm.evaluate.scores import comparison_table
from calm.runs import bundle, presets
from calm.runs.stages import AutoencoderRun, LatentLMRun
from calm.studies.runner import RESULT, Cell, cell_folder, grid, run_cells, taken
from calm.studies.scoring import BRIER, LANGUAGE_MODEL_COLUMNS, WRITING_COLUMNS, LanguageModelScore, against, results_table
from calm.text.atomic_write import write_whole

LATENT_DIMS = {1: 32, 2: 48, 4: 64, 8: 128}
OF_LANGUAGE_MODELS = frozenset(
    ("data", "budget", "grid", "precision", "split", "max_tokens", "bound_samples", "judge", "texts", "speed_tokens")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command asks of a study."""

    name: str
    out: Path
    """folder for the cells and the table, which is written to `out/NAME.md`"""
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
    """what is measured on a language model"""
    model: str | None = None
    """run of a trained model, for studies of what can be done with one"""
    concepts: Sequence[str] = ()
    """what to align it to; empty = the study's own"""
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"experiment {self.name}: seeds must be one or more different numbers, got {tuple(self.seeds)}")

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are to be run, in their order. Raises UsageError for one that there is not."""
        wanted = {word: fnmatch.filter(names, word) for word in self.only}
        if unknown := [word for word, found in wanted.items() if not found]:
            raise UsageError(f"experiment {self.name}: there is no cell {unknown[0]!r}; there are: {', '.join(names)}")
        return [name for name in names if not self.only or any(name in found for found in wanted.values())]

    def written(self, results: Sequence[dict[str, Any]], summary: str) -> dict[str, Any]:
        """What `run` returns, its text being left in `out/NAME.md`."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / f"{self.name}.md", summary + "\n")
        return {"results": list(results), "summary": summary}


def cell_result(
    folder: Path, configured: Any, work: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """What `work()` found for a cell that is no run of a language model: worked out once and left in `folder` beside its
    configuration, read back from then on. None while another process is at it.

    Raises:
        UsageError: the cell is there with another configuration.
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
    with taken(folder) as mine:
        if not mine:
            say(f"{folder}: another process is at it")
            return None
        if (result := finished()) is None:
            result = work()
            write_whole(path, settings)
            write_whole(folder / RESULT, json.dumps(result, indent=2) + "\n")
        return result


@runtime_checkable
class Study(Protocol):
    """A question, and how it is answered."""

    @property
    def summary(self) -> str:
        """The question, in a line."""
        ...

    @property
    def options(self) -> frozenset[str]:
        """Options of `calm experiment` that it reads, beside out, seeds and only; others are refused, and data is asked for
        where it is among them."""
        ...

    def run(self, request: Request) -> dict[str, Any]:
        """Runs what is missing, and returns `request.written(results, summary)`."""
        ...


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a study of language models reads and writes."""

    data: str
    out: Path

    def autoencoder(self, chunk_size: int) -> Path:
        """The run folder of the autoencoder for K."""
        return self.out / f"autoencoder-k{chunk_size}" / "seed-0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelStudy:
    """Language models at one budget of training FLOPs, from prepared data, each cell against the first."""

    summary: str
    chunk_sizes: tuple[int, ...]
    """K of the autoencoders that its cells need"""
    cells: Callable[[Place, float | None], list[Cell]]
    """the cells at a budget"""
    options: frozenset[str] = OF_LANGUAGE_MODELS

    def autoencoders(self, place: Place) -> list[Cell]:
        """The stage-1 runs that its cells stand on."""
        base = presets.get("quickstart").autoencoder
        return [Cell(name=f"autoencoder-k{k}", run=_autoencoder(base, place, k)) for k in self.chunk_sizes]

    def run(self, request: Request) -> dict[str, Any]:
        """Autoencoders are run with the first seed alone, which all cells share; a budget pays for them too."""
        place = Place(str(request.data), request.out)
        cells = grid(self.cells(place, request.budget), request.axes)
        names = request.chosen([cell.name for cell in cells])
        cells = [cell for cell in cells if cell.name in names]
        needed = {cell.run.autoencoder for cell in cells if isinstance(cell.run, LatentLMRun)}
        stage_1 = [cell for cell in self.autoencoders(place) if str(cell_folder(request.out, cell.name, 0)) in needed]
        run_cells(stage_1, request.out, seeds=(0,), score=held_out_accuracy, say=request.say)
        results = run_cells(cells, request.out, seeds=request.seeds, score=request.score, say=request.say)
        return request.written(results, summary_of(f"{request.name}: {self.summary}", cells, results, request))


def held_out_accuracy(folder: Path) -> dict[str, Any]:
    """The score of an autoencoder's cell."""
    report = bundle.load(folder, precision="auto").evaluate(max_tokens=64 * 1024)["autoencoder"]
    return report.scalars()


def summary_of(title: str, cells: Sequence[Cell], results: Sequence[dict[str, Any]], request: Request) -> str:
    """The table of language models, and each cell against the first one."""
    if not results:
        return f"{title}: no cell is done yet"
    done: Callable[[str], list[Path]] = functools.partial(_scored, request=request)
    pairs = against({cell.name: done(cell.name) for cell in cells}, cells[0].name)
    parts = [
        f"{title}; {results[0]['protocol']}",
        results_table(results, LANGUAGE_MODEL_COLUMNS),
        "mean ± 95 % interval over seeds",
    ]
    if any("writing T=1" in result for result in results):
        parts.append(results_table([*results, _held_out(results)], WRITING_COLUMNS))
    if pairs:
        parts += [comparison_table(pairs), "paired bootstrap over the text, each cell the mean of its seeds"]
    return "\n\n".join(parts)


def _held_out(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The text itself as a row beside what the cells wrote of it."""
    first = next(result for result in results if "writing T=1" in result)
    real = {name: {"text": first[name]["held-out text"]} for name in ("writing T=1", "writing T=.5")}
    return {"cell": "held-out text", "brier_lm": None, **real}


def _autoencoder(base: AutoencoderRun, place: Place, chunk_size: int) -> AutoencoderRun:
    model = dataclasses.replace(base.model, chunk_size=chunk_size, latent_dim=LATENT_DIMS[chunk_size])
    return dataclasses.replace(base, data=place.data, model=model)


def _scored(name: str, *, request: Request) -> list[Path]:
    folders = [cell_folder(request.out, name, seed) for seed in request.seeds]
    return [folder for folder in folders if (folder / BRIER).is_file()]
