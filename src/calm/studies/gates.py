"""Gate shares of a hybrid's paths on held-out text, layer by layer and position by position.

The models are the cells of `calm.studies.path_ablation` that have gates; in that study's folder they are read, not trained
again. `OUT/gates.csv` has a row for each cell, seed, segment, layer, position and path:

    mean, std     of the path's share, over the rows of text
    entropy       of the gate at that layer and position in nats, mean over the rows; log P where all P paths have one share

`OUT/gates-CELL.png` shows the means over seeds, blank where a layer does not have the path.
"""

import csv
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.evaluate.plots import new_figure
from calm.evaluate.tables import table
from calm.runs.stages import TokenLMRun
from calm.studies.path_ablation import CELLS, PathAblationStudy, cells, trained
from calm.studies.runner import cell_folder
from calm.studies.scoring import LanguageModelScore, held_out, over_seeds
from calm.studies.study import Request
from calm.text.atomic_write import write_whole
from calm.token.model import TokenLM

BATCH = 8
COLUMNS = ("cell", "seed", "segment", "layer", "position", "path", "mean", "std", "entropy")


class Gate(NamedTuple):
    """Statistics of one gate over rows of text."""

    segment: int
    layer: int
    """within its segment"""
    paths: str
    """letters, in the order of axis P"""
    mean: Float[np.ndarray, "N P"]
    std: Float[np.ndarray, "N P"]
    entropy: Float[np.ndarray, "N"]


@functools.partial(jax.jit, static_argnames="graph")
def _shares(graph: Any, params: Any, tokens: Int[Array, "B N"]) -> dict[int, Float[Array, "B N P"]]:
    lm: TokenLM = nnx.merge(graph, params)
    return lm.backbone.readings(lm.stem(tokens), ("gate",))["gate"]


def gate_statistics(lm: TokenLM, tokens: Int[np.ndarray, "R N"]) -> list[Gate]:
    """The gates of all layers and segments, in the order in which they run.

    Raises:
        UsageError: a backbone without gates.
    """
    config = lm.backbone.config
    if not config.num_shares:
        raise UsageError(f"gates: pattern {config.pattern!r} has no gate; put two or more letters into a group")
    graph, params = nnx.split(lm)
    read = [_shares(graph, params, tokens[at : at + BATCH]) for at in range(0, len(tokens), BATCH)]
    found = []
    for place in read[0]:
        shares = np.concatenate([np.asarray(batch[place], np.float64) for batch in read])
        entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(-1)
        segment, layer = divmod(place, config.num_layers)
        sizes = dict(mean=shares.mean(0), std=shares.std(0), entropy=entropy.mean(0))
        found.append(Gate(segment=segment, layer=layer, paths=config.groups[layer % len(config.groups)], **sizes))
    return found


def gate_rows(cell: str, seed: int, gates: Sequence[Gate]) -> Iterator[tuple[Any, ...]]:
    """Rows of the csv under `COLUMNS`; segments, layers and positions count from 0."""
    for gate in gates:
        for position, entropy in enumerate(gate.entropy):
            for path, letter in enumerate(gate.paths):
                numbers = (gate.mean[position, path], gate.std[position, path], entropy)
                yield (cell, seed, gate.segment, gate.layer, position, letter, *(f"{number:.6f}" for number in numbers))


def draw_gates(of_seeds: Sequence[Sequence[Gate]], title: str, path: Path) -> None:
    """A panel for each letter and one for the entropy: gates from bottom to top, positions from left to right."""
    gates = of_seeds[0]
    letters = "".join(dict.fromkeys("".join(gate.paths for gate in gates)))
    blank = np.full(len(gates[0].entropy), np.nan)
    panels = {
        f"share of {letter}": [
            np.mean([seed[row].mean[:, gate.paths.index(letter)] for seed in of_seeds], 0) if letter in gate.paths else blank
            for row, gate in enumerate(gates)
        ]
        for letter in letters
    }
    panels["entropy, nats"] = [np.mean([seed[row].entropy for seed in of_seeds], 0) for row in range(len(gates))]
    figure = new_figure(3.4 * len(panels), 1.4 + 0.25 * len(gates))
    for axes, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        high = 1.0 if name.startswith("share") else float(np.log(max(len(gate.paths) for gate in gates)))
        image = axes.imshow(np.stack(rows), aspect="auto", origin="lower", vmin=0.0, vmax=high, interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("position", fontsize=9)
        axes.set_yticks(range(len(gates)), [f"{gate.segment + 1}.{gate.layer + 1}" for gate in gates], fontsize=8)
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{title}: segment.layer", fontsize=10)
    figure.savefig(path)


class GateStudy:
    """Gate statistics of the path ablation's cells, as csv, pictures and a table of means."""

    options = PathAblationStudy.options

    def run(self, request: Request) -> dict[str, Any]:
        every = cells(str(request.data), request.budget)
        gated = [cell for cell in every if isinstance(cell.run, TokenLMRun) and cell.run.model.backbone.num_shares]
        results = trained(request.select(gated), request)
        if not results:
            return request.written([], f"{request.title}: no cell is done yet")
        lines, found = io.StringIO(), {}
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(COLUMNS)
        for result in results:
            name, seed = result["cell"], result["seed"]
            gates = gates_of(cell_folder(request.out, name, seed), request.score)
            found.setdefault(name, []).append(gates)
            writer.writerows(gate_rows(name, seed, gates))
        write_whole(request.out / "gates.csv", lines.getvalue())
        for name, gates in found.items():
            draw_gates(gates, name, request.out / f"gates-{name}.png")
        note = "mean share over positions and text ± 95 % interval over seeds; by position: gates.csv"
        return request.written(results, f"{request.title}\n\n{_summary(found)}\n\n{note}")


def gates_of(folder: Path, score: LanguageModelScore) -> list[Gate]:
    """The gates of a trained token model on held-out text."""
    _, lm, blocks, _ = held_out(folder, score)
    return gate_statistics(lm, np.asarray(blocks[:, :-1], np.int32))


def _summary(found: dict[str, list[list[Gate]]]) -> str:
    letters = dict.fromkeys(letter for pattern, _ in CELLS.values() for letter in pattern)
    rows = []
    for name, over in found.items():
        for place, gate in enumerate(over[0]):
            row = [f"{name} segment {gate.segment + 1} layer {gate.layer + 1}"]
            for letter in letters:
                at = gate.paths.find(letter)
                row.append(over_seeds([float(seed[place].mean[:, at].mean()) for seed in over]) if at >= 0 else "-")
            rows.append([*row, over_seeds([float(seed[place].entropy.mean()) for seed in over])])
    return table(["gate", *letters, "entropy, nats"], rows)
