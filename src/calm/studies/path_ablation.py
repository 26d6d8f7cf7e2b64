"""What the paths, the segments and the controller of a hybrid are worth, asked in two ways that have different answers.

    masked at inference    a model was trained with everything, and something is taken from it while it is scored
    retrained              a model was trained without it, at the same budget

The first says what a trained model relies on and sends it where it never was; the second what a path is worth. The table of
"Hybrid Hopfield-SSM Language Model" (J. Adam 2025) stands beside the first: losses of 7 to 10 nats for one path alone come of
masking. It does not say whether the shares that are left were scaled up; both ways are here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from calm.errors import UsageError
from calm.evaluate.blocks import score_ngram
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.tables import table
from calm.hybrid.taps import Tap, mask_paths, replace_controller, shuffle_input, tapped
from calm.runs import bundle, presets
from calm.runs.stages import validation_blocks
from calm.studies.ablation_report import ablation_csv, draw_ablation
from calm.studies.runner import Cell, grid, run_cells
from calm.studies.scoring import LanguageModelScore, over_seeds
from calm.studies.study import OF_LANGUAGE_MODELS, Request
from calm.text.atomic_write import write_whole
from calm.token.likelihood import token_likelihood
from calm.token.model import TokenLM

ROWS, NUM_TOKENS, RATE, SEED = 2, 512, 3e-3, 0
SIZES: dict[str, Any] = dict(dim=128, num_heads=2, num_kv_heads=2, inner_dim=344)
"""half the width of `wikitext2-tiny`: 27 runs on two cores, each of which is to see some hundred thousand words"""
TABLE_DIM = 64
"""width of the token table, for the same reason: the softmax over 33,278 words would take most of a small budget"""
LETTERS = "SHA"
FULL = "SHA-3"
"""the cell with all paths and segments"""
RETRAINED = {
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
"""validation cross-entropy that the description gives, words of WikiText-103, a model of about 107 M weights"""


def cells(data: str, budget: float | None) -> list[Cell]:
    """Token models of every set of paths, and of all paths with two and three segments."""
    base = presets.get("wikitext2-tiny-pure").token_lm
    optimizer = dataclasses.replace(base.train.optimizer, learning_rate=RATE)
    train = dataclasses.replace(base.train, batch_size=ROWS, num_tokens=NUM_TOKENS, optimizer=optimizer)
    found = []
    for name, (pattern, segments) in RETRAINED.items():
        backbone = dataclasses.replace(base.model.backbone, pattern=pattern, num_segments=segments, **SIZES)
        model = dataclasses.replace(base.model, backbone=backbone, table_dim=TABLE_DIM)
        found.append(Cell(name=name, run=dataclasses.replace(base, data=data, model=model, train=train), budget=budget))
    return found


# -- masked at inference ----------------------------------------------------------------------------------------------


def first_segments(lm: TokenLM, number: int) -> TokenLM:
    """A copy of a model with a reasoner that stops after so many segments.

    Raises:
        UsageError: more segments than it has, or none.
    """
    has = lm.backbone.config.num_segments
    if not 1 <= number <= has:
        raise UsageError(f"segments: the model has {has}, asked for the first {number}")
    lm = nnx.merge(*nnx.split(lm))
    lm.backbone.config = dataclasses.replace(lm.backbone.config, num_segments=number)
    return lm


def maskings(lm: TokenLM, length: int) -> dict[str, TokenLM]:
    """Copies of a model of the pattern SHA, each without something. `length`: positions of the rows that they will read.

    A shuffled path reads later positions, so that its loss is none of a language model.
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
    """Nats per held-out token, every token of a block but its first, of a trained model and, of the whole one, of its
    `maskings`."""
    model = bundle.load(folder, precision=score.precision)
    if not isinstance(model.lm, TokenLM):
        raise UsageError(f"{folder}: holds no token model")
    opened = model.prepared_data(None)
    blocks, documents = validation_blocks(opened, model.block_tokens, score.split, score.max_tokens)
    unigram, _ = fit_ngrams(opened.split("train"), model.tokenizer.vocab_size)
    base = score_ngram(unigram, blocks, documents).likelihood
    assert base is not None

    def nats(lm: TokenLM) -> float:
        return float(token_likelihood(lm, blocks, documents).means[0])

    own = nats(model.lm)
    masked: dict[str, float] = {}
    if (model.lm.backbone.config.pattern, model.lm.backbone.config.num_segments) == RETRAINED[FULL]:
        for name, lm in maskings(model.lm, blocks.shape[1] - 1).items():
            masked[name] = own if lm is model.lm else nats(lm)
    manifest = opened.manifest
    return {
        "protocol": f"{manifest.source['name']} {score.split}, {blocks.size} tokens of {manifest.tokenizer['spec']}",
        "nats_per_token": own,
        "unigram_nats": float(base.means[0]),
        "masked": masked,
    }


# -- the study --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationStudy:
    """The cells of this module, each scored whole, and the one with all paths and segments also with parts of it masked: a
    table, every number in `OUT/results.csv`, and a picture."""

    summary: str = "what the paths, the segments and the controller of a hybrid token model are worth, masked and retrained"
    options: frozenset[str] = frozenset(("data", "budget", "grid", "precision", "split", "max_tokens")) & OF_LANGUAGE_MODELS

    def run(self, request: Request) -> dict[str, Any]:
        _, results = trained(request, request.only)
        if results:
            write_whole(request.out / "results.csv", ablation_csv(results))
            draw_ablation(results, FULL, DESCRIBED, request.out / f"{request.name}.png")
        return request.written(results, summary_of(f"{request.name}: {self.summary}", results))


def trained(request: Request, only: Sequence[str]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The cells of these names (empty = all), trained and scored where they were not."""
    every = grid(cells(str(request.data), request.budget), request.axes)
    names = dataclasses.replace(request, only=only).chosen([cell.name for cell in every])
    every = [cell for cell in every if cell.name in names]
    score = request.score
    return every, run_cells(
        every, request.out, seeds=request.seeds, score=lambda folder: ablation_score(folder, score), say=request.say
    )


def summary_of(title: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Two tables, each under what it is: retrained, and masked at inference beside the description's numbers."""
    if not results:
        return f"{title}: no cell is done yet"
    parts = [
        f"{title}; {results[0]['protocol']}; unigram {results[0]['unigram_nats']:.3f} nats",
        "RETRAINED without it, at one budget: nats per token",
        _retrained(results),
    ]
    for name in dict.fromkeys(result["cell"] for result in results if result["masked"]):
        own = [result["masked"] for result in results if result["cell"] == name]
        parts += [f"MASKED AT INFERENCE, of the trained cell {name}: nats per token", _masked(own, described=name == FULL)]
    parts.append(
        "mean ± 95 % interval over seeds; -2 and -3: as many segments; only: the shares of the others are lost "
        "unless the rest is scaled to 1; a path with shuffled input reads later positions"
    )
    return "\n\n".join(parts)


def _retrained(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name in dict.fromkeys(result["cell"] for result in results):
        own = [result for result in results if result["cell"] == name]
        nats = over_seeds([result["nats_per_token"] for result in own])
        rows.append([name, str(len(own)), f"{np.mean([result['tokens'] for result in own]) / 1e6:.3f}", nats])
    return table(["cell", "seeds", "tokens, M", "nats"], rows)


def _masked(own: Sequence[Mapping[str, float]], *, described: bool) -> str:
    """One row a masking: nats, nats above those of the whole model seed by seed, and the description's."""
    rows = []
    for name in own[0]:
        row = [name, over_seeds([each[name] for each in own]), over_seeds([each[name] - each["full"] for each in own])]
        if described:
            row.append(f"{DESCRIBED[name]:.2f}" if name in DESCRIBED else "-")
        rows.append(row)
    return table(["masked", "nats", "above full", *(["described"] if described else [])], rows)
