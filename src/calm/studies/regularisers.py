"""Regularisers of a token model against collapse: label smoothing, z-loss, a hidden flow, averaged weights.

The claim that they prevent it is that of "Hybrid Hopfield-SSM Language Model". Each is tried alone and all together against
none, on a token model of the words of prepared data, at one budget. A cell counts as collapsed if one of these holds on
held-out text:

    diverged    its loss stopped being finite
    marginal    its nats per token are not below the unigram's
    few         its hidden states have an effective rank below D / 50
    loops       more than half of the 4-grams that it writes at temperature 1 occurred before in the same text

A claim of prevention needs something to prevent: at a learning rate that suits the model nothing may collapse, and then
the report says so. A grid over larger rates finds where it does:

    calm experiment regularisers --data WORDS --out OUT --seeds 0 1 2 --budget 2.5e13 \\
        --grid train.optimizer.learning_rate=3e-3,1e-2,3e-2
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm.errors import DivergedError
from calm.evaluate.tables import table
from calm.runs import bundle
from calm.runs.evaluation import score_writing
from calm.studies.base_runs import WORD_TABLE_DIM, token_run
from calm.studies.runner import RESULT, Cell, cell_folder, describe, read_results, run_cells, sized, with_seed
from calm.studies.scoring import Column, LanguageModelScore, by_cell, held_out, over_seeds, results_table, unigram_nats
from calm.studies.study import LANGUAGE_MODEL_OPTIONS, Request
from calm.text.atomic_write import write_whole
from calm.token.collapse import collapse_measures
from calm.token.likelihood import token_likelihood
from calm.token.objective import TokenLossConfig
from calm.train.run_folder import read_records

EMA = 0.99
SMOOTHING, Z, FLOW = 0.1, 1e-4, 0.1
LEAST_RANK_SHARE, MOST_REPEATED = 1 / 50, 0.5
TEXTS, NEW_TOKENS = 16, 96
"""continuations that each cell writes, unless --texts is given, and their tokens"""

LOSSES = {
    "none": TokenLossConfig(),
    "smoothing": TokenLossConfig(label_smoothing=SMOOTHING),
    "z-loss": TokenLossConfig(z_weight=Z),
    "flow": TokenLossConfig(flow_weight=FLOW),
    "flow-both": TokenLossConfig(flow_weight=FLOW, flow_gradient="both"),
    "ema": TokenLossConfig(),
    "all": TokenLossConfig(label_smoothing=SMOOTHING, z_weight=Z, flow_weight=FLOW),
}
AVERAGED = ("ema", "all")


def cells(data: str, budget: float | None) -> list[Cell]:
    """Cells without a regulariser, with each alone (the flow in both forms) and with all."""
    base = token_run(data, table_dim=WORD_TABLE_DIM)
    train = dataclasses.replace(base.train, log_every=5)
    found = []
    for name, loss in LOSSES.items():
        averaged = dataclasses.replace(train, ema_decay=EMA if name in AVERAGED else 0.0)
        found.append(Cell(name=name, run=dataclasses.replace(base, loss=loss, train=averaged), budget=budget))
    return found


class RegulariserStudy:
    """The cells of this module, and whether they collapsed."""

    options = LANGUAGE_MODEL_OPTIONS - {"bound_samples", "speed_tokens"}

    def run(self, request: Request) -> dict[str, Any]:
        every = request.select(cells(str(request.data), request.budget))
        for seed in request.seeds:
            for cell in every:
                _run_cell(cell, seed, request)
        results = read_results(every, request.out, request.seeds)
        return request.written(results, report(request.title, results))


def _run_cell(cell: Cell, seed: int, request: Request) -> None:
    """Trains and scores one cell; divergence is recorded as its result."""
    score = request.score
    try:
        run_cells([cell], request.out, seeds=(seed,), score=lambda folder: collapse_score(folder, score), log=request.log)
    except DivergedError as error:
        run = sized(with_seed(cell.run, seed), cell.budget)
        found = describe(cell.name, seed, run) | {"diverged": str(error), "collapsed": ["diverged"]}
        write_whole(cell_folder(request.out, cell.name, seed) / RESULT, json.dumps(found, indent=2) + "\n")
        request.log(f"{cell.name} seed {seed}: diverged")


# -- scoring ----------------------------------------------------------------------------------------------------------


def collapse_score(folder: Path, score: LanguageModelScore) -> dict[str, Any]:
    """Likelihood, the measures of `calm.token.collapse`, quality of its texts, and the largest rise of the training loss."""
    model, lm, blocks, documents = held_out(folder, score)
    nats, source = token_likelihood(lm, blocks, documents, skip=4), model.prepared_data(None).manifest.source
    judge = None if score.judge is None else bundle.load(score.judge, precision=score.precision)
    texts = min(score.texts or TEXTS, len(blocks))
    new_tokens = min(NEW_TOKENS, model.block_tokens - 32)
    writing = score_writing(model, judge=judge, split=score.split, samples=texts, new_tokens=new_tokens)
    own, *_, real = writing.writings
    found: dict[str, Any] = {
        "protocol": f"{source['name']} {score.split}, {blocks.size} tokens; texts drawn with seed 0",
        "nats_per_token": float(nats.means[0]),
        "unigram_nats": unigram_nats(model, blocks, documents),
        **collapse_measures(lm, blocks),
        "repeated_4": own.repetition and own.repetition.estimate,
        "repeated_4_of_text": real.repetition and real.repetition.estimate,
        "distinct_2": own.distinct[1],
        "distinct_2_of_text": real.distinct[1],
        "judged_bits_per_byte": own.bits_per_byte and own.bits_per_byte.estimate,
        "worst_rise": worst_rise([record["train/loss"] for record in _training(folder)]),
        "width": lm.config.backbone.dim,
    }
    return found | {"collapsed": collapsed(found)}


def _training(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "metrics.jsonl") if record.get("train/loss") is not None]


def worst_rise(losses: Sequence[float]) -> float:
    """Largest rise of a loss above its minimum so far; 0 for a loss that only fell."""
    least, worst = float("inf"), 0.0
    for loss in losses:
        least = min(least, loss)
        worst = max(worst, loss - least)
    return worst


def collapsed(result: Mapping[str, Any]) -> list[str]:
    """The module's signs of collapse that a cell shows, except divergence."""
    signs = {
        "marginal": result["nats_per_token"] >= result["unigram_nats"],
        "few": result["effective_rank"] < LEAST_RANK_SHARE * result["width"],
        "loops": (result["repeated_4"] or 0.0) > MOST_REPEATED,
    }
    return [name for name, shown in signs.items() if shown]


# -- the table --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Column] = {
    "tokens, M": lambda result: result["tokens"] / 1e6,
    "nats": lambda result: result.get("nats_per_token"),
    "effective rank": lambda result: result.get("effective_rank"),
    "alignment": lambda result: result.get("alignment"),
    "information": lambda result: result.get("information"),
    "log Z": lambda result: result.get("log_z"),
    "logit spread": lambda result: result.get("logit_spread"),
    "repeated 4-grams": lambda result: result.get("repeated_4"),
    "distinct-2": lambda result: result.get("distinct_2"),
    "worst rise": lambda result: result.get("worst_rise"),
}


def report(title: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the measures, of each cell's nats against those of `none` seed by seed, and of the cells that collapsed."""
    if not results:
        return f"{title}: no cell is done yet"
    scored = [result for result in results if "diverged" not in result]
    parts = [title, results_table(results, COLUMNS), "mean ± 95 % interval over seeds"]
    if scored:
        text = scored[0]
        parts[0] += f"; {text['protocol']}"
        parts.append(
            f"the text itself: repeated 4-grams {text['repeated_4_of_text']:.3f}, distinct-2 {text['distinct_2_of_text']:.3f}; "
            f"unigram {text['unigram_nats']:.3f} nats"
        )
    parts.append(_verdicts(results))
    if not any(result["collapsed"] for result in results):
        parts.append("no cell collapsed: there was nothing to prevent, and nothing is shown about prevention")
    return "\n\n".join(parts)


def _verdicts(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a cell: seeds that collapsed and how, and nats minus those of the cell `none` of the same seed and grid."""
    cells, rows = by_cell(results), []
    for name, own in cells.items():
        signs = sorted({sign for result in own for sign in result["collapsed"]})
        bare = {result["seed"]: result for result in cells.get(_without(name), [])}
        pairs = [
            result["nats_per_token"] - bare[result["seed"]]["nats_per_token"]
            for result in own
            if "diverged" not in result and "diverged" not in bare.get(result["seed"], {"diverged": ""})
        ]
        count = sum(bool(result["collapsed"]) for result in own)
        rows.append([name, f"{count} of {len(own)}", ", ".join(signs) or "-", over_seeds(pairs) if pairs else "-"])
    return table(["cell", "collapsed", "by", "nats - those of none"], rows)


def _without(name: str) -> str:
    """Name of the cell without regularisers: `all-learning_rate=0.01` -> `none-learning_rate=0.01`."""
    longest = max((known for known in LOSSES if name == known or name.startswith(f"{known}-")), key=len)
    return "none" + name[len(longest) :]
