"""Every pattern of mixers as the backbone of one latent language model: at equal compute, and at equal size.

The recipe is given (`calm.studies.catalogue.written_run`), and `BackboneConfig.pattern` is all that changes. A pattern stands
in the table twice:

    S          the width of A, trained with the FLOPs of the budget: a costly pattern sees less text
    S-size     as many weights as A, trained on as many tokens as A: the FLOPs differ

Letters side by side at the width of A are larger than A, and those of `-size` are therefore narrower: what is compared there is
what a given number of weights is worth, whether they are width or paths.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.core.latent_lm import LatentLMConfig
from calm.errors import UsageError
from calm.evaluate.tables import interval_text, table
from calm.runs.stages import LatentLMRun, load_autoencoder, load_run_config
from calm.studies.runner import Cell, cell_folder, sized
from calm.studies.scoring import BRIER, mean_report, results_table
from calm.studies.study import OF_LANGUAGE_MODELS, LanguageModelStudy, Place, Request
from calm.train.run_folder import read_records

BASELINE = "A"
PATTERNS = (BASELINE, "S", "H", "SH", "SHA", "C,H")
CHUNK_SIZE = 4
NEAR = 0.03
"""share of the baseline's weights by which a pattern of equal size may differ"""


# -- equal size -------------------------------------------------------------------------------------------------------


def equal_size(model: LatentLMConfig, pattern: str) -> BackboneConfig:
    """The backbone of this pattern with which the whole model has as many weights as `model`, within `NEAR`.

    The width is searched in steps that the heads of attention divide, the SwiGLU in proportion; then the SwiGLU alone takes up
    what the steps of the width left over.

    Raises:
        UsageError: no width comes near enough.
    """
    base = model.backbone
    step = 2 * base.num_heads
    wanted = base.parameters() + _around(model, base.dim)

    def at(dim: int, inner_dim: int) -> tuple[int, BackboneConfig]:
        backbone = dataclasses.replace(base, pattern=pattern, dim=dim, inner_dim=inner_dim)
        return backbone.parameters() + _around(model, dim), backbone

    def in_proportion(steps: int) -> tuple[int, BackboneConfig]:
        return at(steps * step, max(1, round(steps * step * base.inner_dim / base.dim)))

    low, high = 1, 4 * max(1, base.dim // step)  # the widest that is no larger than `model`, by halving
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if in_proportion(middle)[0] <= wanted else (low, middle)
    tried = []
    for _, near in sorted((in_proportion(steps) for steps in (low, high)), key=lambda each: abs(each[0] - wanted)):
        size, _ = at(near.dim, near.inner_dim)
        of_one = at(near.dim, near.inner_dim + 1)[0] - size
        tried.append(at(near.dim, max(1, near.inner_dim + round((wanted - size) / of_one))))
    found = min(tried, key=lambda each: abs(each[0] / wanted - 1) > NEAR)  # the nearer width, unless the other alone will do
    if abs(found[0] / wanted - 1) > NEAR:
        raise UsageError(
            f"pattern {pattern!r}: no width gives {wanted:,} weights; the nearest, {found[1].dim}, gives {found[0]:,}"
        )
    return found[1]


@functools.cache
def _around(model: LatentLMConfig, dim: int) -> int:
    """Weights of what stands around a backbone of width `dim`, whatever its pattern."""
    backbone = BackboneConfig(dim=dim, num_layers=1, num_heads=1, num_kv_heads=1)
    return dataclasses.replace(model, backbone=backbone).parameters() - backbone.parameters()


def cells(place: Place, budget: float | None, recipe: Callable[[Place, int], LatentLMRun]) -> list[Cell]:
    """Every pattern at the budget, then every other than the baseline at its size, with its number of tokens."""
    base = recipe(place, CHUNK_SIZE)
    of_budget = [Cell(name=pattern, run=with_backbone(base, pattern=pattern), budget=budget) for pattern in PATTERNS]
    codec = load_autoencoder(base.autoencoder)[0].config
    sizes = {name: getattr(codec, name) for name in ("vocab_size", "chunk_size", "latent_dim")}
    model = dataclasses.replace(with_backbone(base, pattern=BASELINE).model, **sizes)
    train = sized(of_budget[0].run, budget).train
    of_size = []
    for pattern in PATTERNS[1:]:
        run = dataclasses.replace(base, model=dataclasses.replace(base.model, backbone=equal_size(model, pattern)), train=train)
        of_size.append(Cell(name=f"{pattern}-size", run=run))
    return [*of_budget, *of_size]


def with_backbone(run: LatentLMRun, **settings: Any) -> LatentLMRun:
    """The run with other settings of its backbone."""
    backbone = dataclasses.replace(run.model.backbone, **settings)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))


# -- what is measured -------------------------------------------------------------------------------------------------


def state_bytes(config: BackboneConfig, context: int) -> int:
    """Bytes of the state of one sequence with room for `context` positions, as generation keeps it; counted on shapes."""
    state = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)).init_state(1, context).layers)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def costs(folder: Path) -> dict[str, float]:
    """Of a trained run: weights, tokens a second while it trained (the median of its records), bytes of a sequence's state."""
    run = load_run_config(folder)
    assert isinstance(run, LatentLMRun)
    rates = [record["tokens_per_second"] for record in read_records(folder / "timing.jsonl") if "tokens_per_second" in record]
    return {
        "parameters": run.model.parameters(),
        "width": run.model.backbone.dim,
        "trained_tokens_per_second": statistics.median(rates),
        "state_bytes": state_bytes(run.model.backbone, run.train.num_tokens // run.model.chunk_size),
    }


COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "D": lambda result: result["width"],
    "weights, M": lambda result: result["parameters"] / 1e6,
    "tokens, M": lambda result: result["tokens"] / 1e6,
    "tokens/s, training": lambda result: result["trained_tokens_per_second"],
    "state, bytes": lambda result: result["state_bytes"],
    "BrierLM": lambda result: result["brier_lm"],
    "writes, T=1": lambda result: result.get("generated_tokens_per_second", {}).get("T=1 B=1"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridStudy:
    """A study of language models, with what each pattern costs behind its table."""

    recipe: Callable[[Place, int], LatentLMRun]
    """the run for a place and K, whose backbone gets the patterns"""
    summary: str = "patterns of mixers under one latent language model, at equal compute and at equal size"
    options: frozenset[str] = OF_LANGUAGE_MODELS

    def run(self, request: Request) -> dict[str, Any]:
        study = LanguageModelStudy(
            summary=self.summary,
            chunk_sizes=(CHUNK_SIZE,),
            cells=lambda place, budget: cells(place, budget, self.recipe),
        )
        found = study.run(request)
        results = [result | costs(cell_folder(request.out, result["cell"], result["seed"])) for result in found["results"]]
        parts = [found["summary"]]
        if results:
            parts += [
                results_table(results, COLUMNS),
                "-size: as many weights and tokens as A; else the budget. D, weights and state do not hang on the seed",
                brier_table(request.out, results),
                "BrierLM with its 95 % interval by bootstrap over the text, each cell the mean of its seeds",
            ]
        return request.written(results, "\n\n".join(parts))


def brier_table(out: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """BrierLM of every cell with its interval over the text."""
    rows = []
    for name in dict.fromkeys(result["cell"] for result in results):
        folders = [cell_folder(out, name, result["seed"]) for result in results if result["cell"] == name]
        folders = [folder for folder in folders if (folder / BRIER).is_file()]
        rows.append([name, interval_text(mean_report(folders).brier_lm) if folders else "-"])
    return table(["cell", "BrierLM"], rows)
