"""Runner of all studies: cells are run folders, trained once, scored once, and read back after any interruption.

A cell is a configuration and a seed. `OUT/NAME/seed-S/` is its run folder; `result.json` in it marks it as done. A cell
that was stopped continues from its checkpoint, one whose configuration changed is refused. Several processes may share
one folder: each locks the cell it works on, and the lock ends with its process.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

from calm import config as configuration
from calm.core.objective import AutoencoderObjective, LatentObjective
from calm.errors import UsageError
from calm.runs.stages import (
    AutoencoderRun,
    LatentLMRun,
    Run,
    TokenLMRun,
    load_autoencoder,
    load_run_config,
    train_autoencoder,
    train_lm,
)
from calm.runs.token_stage import train_token_lm
from calm.text.atomic_write import write_whole
from calm.text.shards import open_data
from calm.token.objective import TokenObjective

RESULT = "result.json"
Score = Callable[[Path], dict[str, Any]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of a study, to be run for every seed."""

    name: str
    run: Run
    budget: float | None = None
    """training FLOPs including the autoencoder's, which set the number of steps; None = the configuration's steps"""


def run_cells(
    cells: Sequence[Cell], out: str | Path, *, seeds: Sequence[int], score: Score, log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Trains and scores the cells that are not done, seed by seed, and returns all results in the order of the cells.

    Cells that another process works on are skipped.
    """
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise UsageError(f"experiment: two cells have one name: {', '.join(sorted(names))}")
    for seed, cell in itertools.product(seeds, cells):
        folder = cell_folder(out, cell.name, seed)
        run = sized(with_seed(cell.run, seed), cell.budget)
        if (folder / RESULT).is_file():
            _require_unchanged(run, folder)
            continue
        with locked(folder) as mine:
            if not mine:
                log(f"{cell.name} seed {seed}: another process is at it")
            elif not (folder / RESULT).is_file():
                log(f"{cell.name} seed {seed}: {run.train.steps} steps")
                train_run(run, folder)
                write_whole(folder / RESULT, json.dumps(describe(cell.name, seed, run) | score(folder), indent=2) + "\n")
    return read_results(cells, out, seeds)


def _require_unchanged(run: Run, folder: Path) -> None:
    """Raises UsageError where a finished cell was trained with other settings."""
    held = load_run_config(folder)
    for part in ("train", "loss"):
        if getattr(held, part, None) != getattr(run, part, None):
            raise UsageError(f"{folder}: was run with other settings of {part} (budget, grid or study); choose another --out")


def read_results(cells: Sequence[Cell], out: str | Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Results of all cells and seeds that are done."""
    paths = [cell_folder(out, cell.name, seed) / RESULT for cell in cells for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def cell_folder(out: str | Path, name: str, seed: int) -> Path:
    return Path(out) / name / f"seed-{seed}"


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks a cell while the block runs; yields False where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def with_seed(run: Run, seed: int) -> Run:
    """The run with a seed, on the autoencoder of that seed where it names one that a study trained."""
    train = dataclasses.replace(run.train, seed=seed)
    if isinstance(run, LatentLMRun):
        codes = Path(run.autoencoder)
        if codes.name == "seed-0" and codes.parent.name.startswith("autoencoder-"):
            run = dataclasses.replace(run, autoencoder=str(codes.with_name(f"seed-{seed}")))
    return dataclasses.replace(run, train=train)


def train_run(run: Run, out: str | Path) -> None:
    """Trains a run of any kind into a folder, or continues it from its checkpoint."""
    if isinstance(run, AutoencoderRun):
        train_autoencoder(run, out, quiet=True)
    elif isinstance(run, LatentLMRun):
        train_lm(run, out, quiet=True)
    else:
        train_token_lm(run, out, quiet=True)


# -- budgets ----------------------------------------------------------------------------------------------------------


def sized(run: Run, budget: float | None) -> Run:
    """The run with as many steps as `budget` FLOPs pay for; schedules that are given in steps are scaled with it.

    All compute counts: the autoencoder of a latent model is paid for first.

    Raises:
        UsageError: the budget pays for no step.
    """
    if budget is None:
        return run
    before, per_token = autoencoder_flops(run), flops_per_token(run)
    tokens = run.train.batch_size * run.train.num_tokens
    steps = math.floor((budget - before) / (per_token * tokens))
    if steps < 1:
        raise UsageError(
            f"budget {budget:.3g} FLOPs is too little: the autoencoder took {before:.3g}, a step costs {per_token * tokens:.3g}"
        )
    half = max(1, steps // 2)
    schedule = dataclasses.replace(run.train.optimizer, warmup_steps=min(run.train.optimizer.warmup_steps, max(1, steps // 5)))
    train = dataclasses.replace(run.train, steps=steps, optimizer=schedule, evaluate_every=half, save_every=half)
    return dataclasses.replace(_rescheduled(run, steps), train=dataclasses.replace(train, sample_every=0))


def _rescheduled(run: Run, steps: int) -> Run:
    """The run with the steps at which loss terms start and end scaled to `steps` steps."""
    if not isinstance(run, LatentLMRun):
        return run
    terms = []
    for term in run.loss.terms.values():
        at = {name: getattr(term, name) for name in ("decay_steps", "from_step")}
        scaled = {name: max(1, round(step * steps / run.train.steps)) for name, step in at.items() if step}
        terms.append(dataclasses.replace(term, **scaled))
    return dataclasses.replace(run, loss=run.loss.with_terms(*terms))


def flops_per_token(run: Run) -> float:
    """Forward and backward FLOPs per token, from shapes alone."""
    vocab_size = open_data(run.data).tokenizer.vocab_size
    if isinstance(run, AutoencoderRun):
        model = dataclasses.replace(run.model, vocab_size=vocab_size)
        return AutoencoderObjective(model, run.loss, mask_id=0).flops_per_token()
    if isinstance(run, TokenLMRun):
        model = dataclasses.replace(run.model, vocab_size=vocab_size)
        return TokenObjective(model, run.loss, context=run.train.num_tokens).flops_per_token()
    autoencoder, _ = load_autoencoder(run.autoencoder)
    sizes = {name: getattr(autoencoder.config, name) for name in ("vocab_size", "chunk_size", "latent_dim")}
    model = dataclasses.replace(run.model, **sizes)
    context = run.train.num_tokens // model.chunk_size
    return LatentObjective(model, run.loss, autoencoder, context=context).flops_per_token()


def autoencoder_flops(run: Run) -> float:
    """Training FLOPs of the autoencoder of a latent model; 0 for other kinds and for a model without latents."""
    if not isinstance(run, LatentLMRun) or not run.model.has_latents:
        return 0.0
    stage_1 = load_run_config(run.autoencoder)
    if not isinstance(stage_1, AutoencoderRun):
        raise UsageError(f"autoencoder {run.autoencoder}: name the run that trained it, so that its compute can be counted")
    return flops_per_token(stage_1) * stage_1.train.steps * stage_1.train.batch_size * stage_1.train.num_tokens


def describe(name: str, seed: int, run: Run) -> dict[str, Any]:
    """Name, seed, size and cost of a cell, as they begin its result."""
    tokens = run.train.steps * run.train.batch_size * run.train.num_tokens
    per_token, before = flops_per_token(run), autoencoder_flops(run)
    epoch = open_data(run.data).split("train").num_tokens
    return {
        "cell": name,
        "seed": seed,
        "steps": run.train.steps,
        "tokens": tokens,
        "epochs": tokens / epoch,
        "training_flops": per_token * tokens + before,
        "autoencoder_flops": before,
        "parameters": run.model.parameters() if run.model.vocab_size else None,
    }


# -- grids ------------------------------------------------------------------------------------------------------------


def grid(cells: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Every cell for every combination of dotted settings, such as `{"loss.terms.auxiliary.weight": ["0", "1", "3"]}`.

    Raises:
        UsageError: a setting that the configuration does not have.
    """
    return [
        dataclasses.replace(cell, name=cell.name + suffix, run=run)
        for cell in cells
        for suffix, run in variants(cell.run, axes)
    ]


def variants(configured: T, axes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, T]]:
    """A configuration under every combination of dotted settings, each with a suffix for the cell's name."""
    for values in itertools.product(*axes.values()):
        varied, suffix = configured, ""
        for key, value in zip(axes, values, strict=True):
            varied = configuration.from_dict(type(varied), _nested(key, value), varied, where=f"grid {key}={value}")
            parts = key.split(".")
            suffix += f"-{'.'.join(parts[-2:] if 'terms' in parts else parts[-1:])}={value}"
        yield suffix, varied


def parse_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """`["train.seed=0,1"]` -> `{"train.seed": ["0", "1"]}`."""
    axes = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not key or not equals or not values:
            raise UsageError(f"--grid: expected KEY=VALUE,VALUE such as loss.terms.auxiliary.weight=0,1,3, got {word!r}")
        axes[key] = values.split(",")
    return axes


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
