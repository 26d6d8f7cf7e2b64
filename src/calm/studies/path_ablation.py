"""The value of a hybrid's paths, segments and controller, measured in two ways that answer different questions.

    masked at inference    a model was trained with everything, and a part is removed while it is scored
    retrained              a model was trained without the part, at the same budget

The first shows what a trained model relies on, and takes it out of its training distribution; the second what a path is
worth. The table of "Hybrid Hopfield-SSM Language Model" (J. Adam 2025) is printed beside the first: losses of 7 to 10 nats
for one path alone result from masking. It does not say whether the remaining shares were rescaled; both forms are here.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from calm.core.mixer import Tap
from calm.errors import UsageError
from calm.evaluate.plots import COLOURS, new_figure, tidy
from calm.evaluate.tables import table
from calm.hybrid.backbone import of_pattern
from calm.hybrid.taps import mask_paths, replace_controller, shuffle_input, tapped
from calm.studies.base_runs import WORD_TABLE_DIM, token_run
from calm.studies.runner import Cell, run_cells
from calm.studies.scoring import LanguageModelScore, by_cell, held_out, over_seeds, unigram_nats
from calm.studies.study import Request
from calm.text.atomic_write import write_whole
from calm.token.likelihood import token_likelihood
from calm.token.model import TokenLM

SEED = 0
SIZES: dict[str, Any] = dict(dim=128, num_heads=2, num_kv_heads=2, inner_dim=344)
"""half the width of `wikitext2-tiny`, so that 27 runs on two cores see some hundred thousand words each"""
LETTERS = "SHA"
FULL = "SHA-3"
"""the cell with all paths and segments"""
CELLS = {
    FULL: ("SHA", 3),
    "SHA-2": ("SHA", 2),
    "SHA": ("SHA", 1),
    "S": ("S", 1),
    "H": ("H", 1),
    "A": ("A", 1),
    "SH": ("SH", 1),
    "SA": ("SA", 1),
    "HA": ("HA", 1),
}
"""cell -> pattern and segments"""

DESCRIBED = {
    "full": 3.60,
    "only S": 9.81,
    "only H": 7.72,
    "only A": 9.15,
    "only SH": 5.43,
    "only SA": 9.51,
    "only HA": 7.40,
    "segment 1": 3.89,
    "segment 2": 3.61,
    "segment 3": 3.60,
    "controller normal": 3.60,
    "controller shuffled": 3.73,
    "controller random": 4.11,
    "controller none": 3.89,
    "shuffled input of A": 4.35,
    "shuffled input of S": 6.00,
    "shuffled input of H": 8.01,
}
"""validation cross-entropy reported by the description: words of WikiText-103, a model of about 107 M weights"""
RETRAINED, MASKED = "retrained", "masked at inference"
CSV_COLUMNS = ("kind", "cell", "masked", "seed", "nats")


def cells(data: str, budget: float | None) -> list[Cell]:
    """Token models of every set of paths, and of all paths with two and three segments."""
    base = token_run(data, table_dim=WORD_TABLE_DIM)
    found = []
    for name, (pattern, segments) in CELLS.items():
        backbone = of_pattern(base.model.backbone, pattern, num_segments=segments, **SIZES)
        model = dataclasses.replace(base.model, backbone=backbone)
        found.append(Cell(name=name, run=dataclasses.replace(base, model=model), budget=budget))
    return found


# -- masked at inference ----------------------------------------------------------------------------------------------


def first_segments(lm: TokenLM, number: int) -> TokenLM:
    """A copy of a model with a reasoner, which stops after `number` segments.

    Raises:
        UsageError: the model has fewer segments, or `number` is 0.
    """
    has = lm.backbone.config.num_segments
    if not 1 <= number <= has:
        raise UsageError(f"segments: the model has {has}, asked for the first {number}")
    lm = nnx.merge(*nnx.split(lm))
    lm.backbone.config = dataclasses.replace(lm.backbone.config, num_segments=number)
    return lm


def maskings(lm: TokenLM, length: int) -> dict[str, TokenLM]:
    """Copies of a model of the pattern SHA, each with a part removed or replaced, for rows of `length` positions.

    A shuffled path reads later positions, so its loss is not that of a language model.
    """
    config, key = lm.backbone.config, jax.random.key(SEED)
    found = {"full": lm}

    def add(name: str, tap: Tap) -> None:
        found[name] = tapped(lm, tap)

    for kept in ("S", "H", "A", "SH", "SA", "HA"):
        lost = "".join(letter for letter in LETTERS if letter not in kept)
        add(f"only {kept}", mask_paths(config.groups, lost, renormalise=False))
        add(f"only {kept}, shares scaled to 1", mask_paths(config.groups, lost, renormalise=True))
    if config.num_segments > 1:
        found |= {f"segment {number + 1}": first_segments(lm, number + 1) for number in range(config.num_segments)}
        found["controller normal"] = lm
        add("controller shuffled", replace_controller("shuffled", key))
        add("controller random", replace_controller("random", key))
        add("controller none", replace_controller("zero"))
    order = jax.random.permutation(key, length)
    for letter in ("A", "S", "H"):
        add(f"shuffled input of {letter}", shuffle_input(letter, order))
    return found


def ablation_score(folder: Path, score: LanguageModelScore) -> dict[str, Any]:
    """Nats per held-out token, averaged over every token of a block but its first, of a trained model, and of its
    `maskings` where it is the cell `FULL`."""
    model, own_lm, blocks, documents = held_out(folder, score)

    def nats(lm: TokenLM) -> float:
        return float(token_likelihood(lm, blocks, documents).means[0])

    own, config = nats(own_lm), own_lm.backbone.config
    masked: dict[str, float] = {}
    if (config.pattern, config.num_segments) == CELLS[FULL]:
        for name, lm in maskings(own_lm, blocks.shape[1] - 1).items():
            masked[name] = own if lm is own_lm else nats(lm)
    manifest = model.prepared_data(None).manifest
    return {
        "protocol": f"{manifest.source['name']} {score.split}, {blocks.size} tokens of {manifest.tokenizer['spec']}",
        "nats_per_token": own,
        "unigram_nats": unigram_nats(model, blocks, documents),
        "masked": masked,
    }


# -- the study --------------------------------------------------------------------------------------------------------


class PathAblationStudy:
    """All cells retrained, and the cell `FULL` with parts masked: a table, `OUT/results.csv` and a picture."""

    options = frozenset(("data", "budget", "grid", "precision", "split", "max_tokens"))

    def run(self, request: Request) -> dict[str, Any]:
        results = trained(request.select(cells(str(request.data), request.budget)), request)
        if results:
            write_whole(request.out / "results.csv", ablation_csv(results))
            draw_ablation(results, request.out / f"{request.name}.png")
        return request.written(results, report(request.title, results))


def trained(cells: Sequence[Cell], request: Request) -> list[dict[str, Any]]:
    """Results of cells, trained and scored where they are not done."""
    score = request.score
    return run_cells(
        cells, request.out, seeds=request.seeds, score=lambda folder: ablation_score(folder, score), log=request.log
    )


def report(title: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Two kinds of table, each under its name: retrained, and masked at inference beside the description's numbers."""
    if not results:
        return f"{title}: no cell is done yet"
    parts = [
        f"{title}; {results[0]['protocol']}; unigram {results[0]['unigram_nats']:.3f} nats",
        "RETRAINED without it, at one budget: nats per token",
        _retrained(results),
    ]
    for name, own in by_cell([result for result in results if result["masked"]]).items():
        parts += [
            f"MASKED AT INFERENCE, of the trained cell {name}: nats per token",
            _masked([result["masked"] for result in own], described=name == FULL),
        ]
    parts.append(
        "mean ± 95 % interval over seeds; -2 and -3: as many segments; only: the shares of the others are lost "
        "unless the rest is scaled to 1; a path with shuffled input reads later positions"
    )
    return "\n\n".join(parts)


def _retrained(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, own in by_cell(results).items():
        nats = over_seeds([result["nats_per_token"] for result in own])
        rows.append([name, str(len(own)), f"{np.mean([result['tokens'] for result in own]) / 1e6:.3f}", nats])
    return table(["cell", "seeds", "tokens, M", "nats"], rows)


def _masked(own: Sequence[Mapping[str, float]], *, described: bool) -> str:
    """One row a masking: nats, nats above those of the whole model seed by seed, and the description's number."""
    rows = []
    for name in own[0]:
        row = [name, over_seeds([each[name] for each in own]), over_seeds([each[name] - each["full"] for each in own])]
        if described:
            row.append(f"{DESCRIBED[name]:.2f}" if name in DESCRIBED else "-")
        rows.append(row)
    return table(["masked", "nats", "above full", *(["described"] if described else [])], rows)


def ablation_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each number under `CSV_COLUMNS`; `masked` is empty where a model was retrained."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        writer.writerow((RETRAINED, result["cell"], "", result["seed"], f"{result['nats_per_token']:.6f}"))
        for what, nats in result["masked"].items():
            writer.writerow((MASKED, result["cell"], what, result["seed"], f"{nats:.6f}"))
    return lines.getvalue()


def draw_ablation(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left every retrained cell, right the cell `FULL` with parts masked, crosses marking the description's numbers.

    Dots are seeds. Beyond the dotted line, the unigram's loss, a model is worse than one that ignores the text before.
    """
    retrained = {name: [result["nats_per_token"] for result in own] for name, own in by_cell(results).items()}
    full = [result["masked"] for result in results if result["cell"] == FULL and result["masked"]]
    masked = {part: [nats[part] for nats in full] for part in (full[0] if full else ())}
    figure = new_figure(11.0, 1.4 + 0.22 * max(len(retrained), len(masked)))
    panels = {f"{RETRAINED} without it": retrained, f"{FULL}, {MASKED}": masked}
    for axes, (title, rows) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        tidy(axes, title, "nats per token", "")
        for row, (name, nats) in enumerate(rows.items()):
            axes.plot(nats, np.full(len(nats), -row), "o", color=COLOURS[0], markersize=4)
            if rows is masked and name in DESCRIBED:
                axes.plot(DESCRIBED[name], -row, "x", color=COLOURS[4], markersize=5)
        axes.plot([], [], "o", color=COLOURS[0], markersize=4, label="here, one dot a seed")
        if rows is masked:
            axes.plot([], [], "x", color=COLOURS[4], markersize=5, label="described: another model and text")
        axes.axvline(results[0]["unigram_nats"], color="0.6", linewidth=1, linestyle=":", label="unigram, here")
        axes.set_yticks([-row for row in range(len(rows))], list(rows), fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
