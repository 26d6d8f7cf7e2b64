"""Latent spaces compared with the language model on them: spherical and Gaussian, one level and two.

A cell is an autoencoder and a language model that predicts its latents. Half of a budget trains the first, the rest the
second, so that a more expensive autoencoder sees less text. Unlike in other studies every seed trains its own autoencoder,
as it is what is compared.

The language model is pure CALM with the auxiliary cross-entropy. A context decoder writes the chunk itself and could make
up for a bad latent space; here every token has to pass through the frozen autoencoder. Without the auxiliary term all
cells stay at BrierLM 0 at this size (docs/log.md), which compares nothing.

    gaussian-k4                     the usual one: K = 4, Z = 64
    spherical-k4                    the same with a power-spherical posterior
    gaussian-k16                    K = 16, Z = 256, twice as wide: 16 tokens do not pass through a width of 128
    hierarchical-k16                the same with a lower level of 4 tokens
    hierarchical-k16-upper-loss     the same without a loss on the lower level
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from calm.config import from_dict
from calm.core.autoencoder import AutoencoderConfig
from calm.core.intervals import Interval
from calm.evaluate.inspection import AutoencoderInspection
from calm.evaluate.tables import interval_text, table
from calm.heads.terms import AuxiliaryTerm
from calm.posteriors.hierarchical import HierarchicalAutoencoder
from calm.runs import bundle, presets
from calm.runs.evaluation import inspect_latents
from calm.runs.stages import AutoencoderRun, LatentLMRun
from calm.studies.base_runs import pure_run
from calm.studies.runner import RESULT, Cell, cell_folder, run_cells
from calm.studies.scoring import Column, LanguageModelScore, brier_table, results_table
from calm.studies.study import LANGUAGE_MODEL_OPTIONS, Place, Request, comparison

AUTOENCODER_SHARE = 0.5
"""share of a budget that trains the autoencoder"""
LEVELS = (0.3, 0.6)
"""noise added to latents, in units of their aggregate standard deviation"""
CODED_TOKENS = 16 * 1024
"""held-out tokens that the autoencoders are scored on"""

_WIDE: dict[str, Any] = dict(chunk_size=16, latent_dim=256, dim=256, inner_dim=640)
_LEVELS: dict[str, Any] = dict(_WIDE, kind="hierarchical", lower_chunk_size=4, lower_latent_dim=64)
SPACES: dict[str, dict[str, Any]] = {
    "gaussian-k4": {},
    "spherical-k4": dict(posterior="power_spherical"),
    "gaussian-k16": _WIDE,
    "hierarchical-k16": _LEVELS,
    "hierarchical-k16-upper-loss": dict(_LEVELS, lower_weight=0.0),
}
"""cell -> settings of the autoencoder that differ from the preset `wikitext2-tiny`"""


def autoencoder_run(place: Place, name: str) -> AutoencoderRun:
    """Stage 1 of a cell."""
    base = presets.get("wikitext2-tiny").autoencoder
    return dataclasses.replace(base, data=place.data, model=from_dict(AutoencoderConfig, SPACES[name], base.model))


def _with_auxiliary(place: Place) -> LatentLMRun:
    return pure_run(place, 4, AuxiliaryTerm())


def autoencoders(place: Place, budget: float | None) -> list[Cell]:
    """Stage 1 of every cell."""
    share = None if budget is None else AUTOENCODER_SHARE * budget
    return [Cell(name=f"autoencoder-{name}", run=autoencoder_run(place, name), budget=share) for name in SPACES]


def language_models(place: Place, budget: float | None, seed: int, recipe: Callable[[Place], LatentLMRun]) -> list[Cell]:
    """Stage 2 of every cell, on the autoencoder of its seed."""
    found = []
    for name in SPACES:
        folder = cell_folder(place.out, f"autoencoder-{name}", seed)
        found.append(Cell(name=name, run=dataclasses.replace(recipe(place), autoencoder=str(folder)), budget=budget))
    return found


def _autoencoder_of(cell: Cell) -> Path:
    assert isinstance(cell.run, LatentLMRun)
    return Path(cell.run.autoencoder)


# -- measurements ----------------------------------------------------------------------------------------------------


def coding(folder: Path, score: LanguageModelScore) -> dict[str, Any]:
    """Score of an autoencoder, and of its lower level: reconstruction, also under noise, and statistics of the latents."""
    model = bundle.load(folder, precision=score.precision)

    def measured(model: bundle.Bundle) -> dict[str, Any]:
        found = inspect_latents(model, split=score.split, max_tokens=CODED_TOKENS)
        return measures(found) | {"kl_per_token": float(found.kl.sum()) / model.chunk_size}

    result = measured(model)
    if isinstance(model.autoencoder, HierarchicalAutoencoder):
        result["lower"] = measured(dataclasses.replace(model, autoencoder=model.autoencoder.lower))
    return result


def measures(found: AutoencoderInspection) -> dict[str, Any]:
    """Shares of tokens and chunks right, with intervals over the text, and statistics of the latents."""
    curve = next(curve for curve in found.curves if curve.unit == "aggregate")
    at = {level: curve.levels.index(level) for level in (0.0, *LEVELS)}
    shares = {f"tokens {level:g}": curve.tokens[place] for level, place in at.items()}
    shares |= {f"chunks {level:g}": curve.chunks[place] for level, place in at.items()}
    shares["tokens of a draw"] = found.sampled_tokens
    return {
        "shares": {name: interval.to_dict() for name, interval in shares.items()},
        "posterior_std": float(found.posterior_std.mean()),
        "aggregate_std": float(found.aggregate_std.mean()),
        "active": float(found.active),
        "effective_rank": found.effective_rank,
        "smoothness": found.neighbours.smoothness,
        "protocol": found.protocol.line(),
    }


def _share(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda result: 100 * result["shares"][name]["estimate"]


CODING_COLUMNS: dict[str, Column] = {
    "tokens right %": _share("tokens 0"),
    "chunks right %": _share("chunks 0"),
    **{f"{what} at {level:g} std": _share(f"{what} {level:g}") for level in LEVELS for what in ("tokens", "chunks")},
    "tokens of a draw": _share("tokens of a draw"),
    "KL, nats/token": lambda result: result["kl_per_token"],
    "sigma": lambda result: result["posterior_std"],
    "aggregate std": lambda result: result["aggregate_std"],
    "active": lambda result: result["active"],
    "smoothness": lambda result: result["smoothness"],
    "tokens, M": lambda result: result["tokens"] / 1e6,
}


def by_level(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every autoencoder, and one for its lower level where it has one."""
    rows = []
    for result in results:
        name = result["cell"].removeprefix("autoencoder-")
        rows.append({**result, "cell": name})
        if "lower" in result:
            rows.append({**result, **result["lower"], "cell": f"{name}, lower level"})
    return rows


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens and chunks right with their intervals over the text, for the first seed of every cell."""
    first = {row["cell"]: row for row in reversed(rows)}
    names = [f"{what} {level:g}" for what in ("tokens", "chunks") for level in (0.0, *LEVELS)]
    found = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        shares = [Interval.from_dict(first[cell]["shares"][name]).scaled(100.0) for name in names]
        found.append([f"{cell} (seed {first[cell]['seed']})", *map(interval_text, shares)])
    header = [
        f"{what} right %" + (f" at {level:g} std" if level else "") for what in ("tokens", "chunks") for level in (0, *LEVELS)
    ]
    return table(["autoencoder", *header], found)


@dataclasses.dataclass(frozen=True)
class LatentSpaceStudy:
    """Autoencoders and a language model on each: reconstruction, robustness to noise, and BrierLM."""

    recipe: Callable[[Place], LatentLMRun] = _with_auxiliary
    """the language model, whose autoencoder is replaced by the cell's"""
    options: ClassVar[frozenset[str]] = LANGUAGE_MODEL_OPTIONS

    def run(self, request: Request) -> dict[str, Any]:
        place = Place(str(request.data), request.out)
        coded, results = [], []
        for seed in request.seeds:
            cells = self._cells(place, request, seed)
            needed = set(map(_autoencoder_of, cells))
            stage_1 = autoencoders(place, request.budget)
            stage_1 = [cell for cell in stage_1 if cell_folder(request.out, cell.name, seed) in needed]
            options: dict[str, Any] = dict(seeds=(seed,), log=request.log)
            coded += run_cells(stage_1, request.out, score=lambda folder: coding(folder, request.score), **options)
            done = [cell for cell in cells if (_autoencoder_of(cell) / RESULT).is_file()]  # else another process is at it
            results += run_cells(done, request.out, score=request.score, **options)
        cells = self._cells(place, request, request.seeds[0])
        return request.written([*coded, *results], self._report(cells, coded, results, request))

    def _cells(self, place: Place, request: Request, seed: int) -> list[Cell]:
        return request.select(language_models(place, request.budget, seed, self.recipe))

    def _report(self, cells: list[Cell], coded: list[dict[str, Any]], results: list[dict[str, Any]], request: Request) -> str:
        parts = [comparison(cells, results, request)]
        if results:
            parts.append(brier_table(request.out, results))
        if coded:
            rows = by_level(coded)
            parts += [
                results_table(rows, CODING_COLUMNS),
                "autoencoders: decoded from the posterior's mean, from the mean under noise of so many aggregate standard "
                f"deviations, and from a draw; {coded[0]['protocol']}",
                accuracy_table(rows),
                "95 % intervals by bootstrap over the text",
            ]
        return "\n\n".join(parts)
