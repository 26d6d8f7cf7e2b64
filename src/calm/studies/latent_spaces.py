"""What a latent space is worth: a sphere beside the Gaussian, two levels beside one, each with the language model on it.

A cell is an autoencoder and a language model that predicts its latents. Half of a budget trains the first, the rest the second,
so that a costlier autoencoder sees less text, as in all studies. Unlike in those, every seed trains its own autoencoder: it is
what is compared.

The language model is pure CALM with the auxiliary cross-entropy. A context decoder would write the chunk itself and could make
up for a bad latent space; here every token has to come through the frozen autoencoder. Without the auxiliary term all cells
stay at BrierLM 0 at this size (docs/log.md), which compares nothing.

    gaussian-k4                     the usual one: K = 4, Z = 64
    spherical-k4                    the same with a power-spherical posterior
    gaussian-k16                    K = 16, Z = 256, twice as wide: 16 tokens do not pass through a width of 128
    hierarchical-k16                the same with a lower level of 4 tokens
    hierarchical-k16-upper-loss     and that without a loss on the lower level: is it the shape or the loss that does it?
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm.core.autoencoder import HierarchicalAutoencoder
from calm.core.intervals import Interval
from calm.evaluate.inspection import AutoencoderInspection
from calm.evaluate.tables import interval_text, table
from calm.runs import bundle, presets
from calm.runs import measure as examine
from calm.runs.stages import AutoencoderRun, LatentLMRun
from calm.studies.hybrids import brier_table
from calm.studies.runner import RESULT, Cell, cell_folder, grid, run_cells
from calm.studies.scoring import LanguageModelScore, results_table
from calm.studies.study import OF_LANGUAGE_MODELS, Place, Request, summary_of

AUTOENCODER_SHARE = 0.5
"""of a budget"""
LEVELS = (0.3, 0.6)
"""noise that the latent has to bear, in units of its aggregate standard deviation"""
CODED_TOKENS = 16 * 1024
"""held-out tokens that the autoencoders are scored on"""

_WIDE: dict[str, Any] = dict(chunk_size=16, latent_dim=256, dim=256, inner_dim=640)
_LEVELS: dict[str, Any] = dict(_WIDE, lower_chunk_size=4, lower_latent_dim=64)
SPACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gaussian-k4": ({}, {}),
    "spherical-k4": (dict(posterior="power_spherical"), {}),
    "gaussian-k16": (_WIDE, {}),
    "hierarchical-k16": (_LEVELS, {}),
    "hierarchical-k16-upper-loss": (_LEVELS, dict(lower_weight=0.0)),
}
"""cell -> what differs from the preset `wikitext2-tiny` in the autoencoder's model, and in its loss"""


def autoencoder_run(place: Place, name: str) -> AutoencoderRun:
    """Stage 1 of a cell."""
    base, (model, loss) = presets.get("wikitext2-tiny").autoencoder, SPACES[name]
    model, loss = dataclasses.replace(base.model, **model), dataclasses.replace(base.loss, **loss)
    return dataclasses.replace(base, data=place.data, model=model, loss=loss)


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


# -- what is measured -------------------------------------------------------------------------------------------------


def coding(folder: Path, score: LanguageModelScore) -> dict[str, Any]:
    """The score of an autoencoder: what comes back, under noise too, and what its latents are like; and of a lower level."""
    model = bundle.load(folder, precision=score.precision)

    def measured(model: bundle.Bundle) -> dict[str, Any]:
        found = examine.latents(model, split=score.split, max_tokens=CODED_TOKENS)
        return measures(found) | {"kl_per_token": float(found.kl.sum()) / model.chunk_size}

    result = measured(model)
    if isinstance(model.autoencoder, HierarchicalAutoencoder):
        result["lower"] = measured(dataclasses.replace(model, autoencoder=model.autoencoder.lower))
    return result


def measures(found: AutoencoderInspection) -> dict[str, Any]:
    """Shares with their intervals over the text, and the latents' statistics."""
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


CODING_COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpaceStudy:
    """Autoencoders, and a language model on each: what comes back, what it bears, and what is predicted."""

    recipe: Callable[[Place], LatentLMRun]
    """the language model for a place, whose autoencoder is replaced by the cell's"""
    summary: str = "a spherical latent beside the Gaussian, a hierarchical autoencoder beside a flat one, and BrierLM on each"
    options: frozenset[str] = OF_LANGUAGE_MODELS

    def run(self, request: Request) -> dict[str, Any]:
        place = Place(str(request.data), request.out)
        chosen = set(request.chosen([cell.name for cell in self._cells(place, request, request.seeds[0])]))
        coded, results = [], []
        for seed in request.seeds:
            cells = [cell for cell in self._cells(place, request, seed) if cell.name in chosen]
            needed = set(map(_autoencoder_of, cells))
            stage_1 = [
                cell for cell in autoencoders(place, request.budget) if cell_folder(request.out, cell.name, seed) in needed
            ]
            options: dict[str, Any] = dict(seeds=(seed,), say=request.say)
            coded += run_cells(stage_1, request.out, score=lambda folder: coding(folder, request.score), **options)
            done = [cell for cell in cells if (_autoencoder_of(cell) / RESULT).is_file()]  # else another process is at it
            results += run_cells(done, request.out, score=request.score, **options)
        cells = [cell for cell in self._cells(place, request, request.seeds[0]) if cell.name in chosen]
        return request.written([*coded, *results], self._text(cells, coded, results, request))

    def _cells(self, place: Place, request: Request, seed: int) -> list[Cell]:
        return grid(language_models(place, request.budget, seed, self.recipe), request.axes)

    def _text(self, cells: list[Cell], coded: list[dict[str, Any]], results: list[dict[str, Any]], request: Request) -> str:
        parts = [summary_of(f"{request.name}: {self.summary}", cells, results, request)]
        if results:
            parts += [
                brier_table(request.out, results),
                "BrierLM with its 95 % interval by bootstrap over the text, each cell the mean of its seeds",
            ]
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
