"""One runner for all studies: cells that are run folders, trained once, scored once, and read back after any interruption.

A cell is a configuration and a seed. `OUT/NAME/seed-S/` is its run folder, and `result.json` in it says that it is done; a cell
that was stopped goes on from its checkpoint, one whose configuration changed is refused. Cells may run in several processes at
once on the same folder: a cell is taken by its lock, which dies with its process.
"""

import dataclasses
import fcntl
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of a study, to be run for every seed."""

    name: str
    run: Run
    budget: float | None = None
    """training FLOPs, those of its autoencoder included; they set the number of steps. None = the configuration's steps"""


def run_cells(
    cells: Sequence[Cell], out: str | Path, *, seeds: Sequence[int], score: Score, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Trains and scores what is not done yet, seed by seed, and returns every result that there is, in the order of the cells.

    Cells that another process is at are left to it.
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
        with taken(folder) as mine:
            if not mine:
                say(f"{cell.name} seed {seed}: another process is at it")
            elif not (folder / RESULT).is_file():
                say(f"{cell.name} seed {seed}: {run.train.steps} steps")
                train_run(run, folder)
                write_whole(folder / RESULT, json.dumps(describe(cell.name, seed, run) | score(folder), indent=2) + "\n")
    return read_results(cells, out, seeds)


def _require_unchanged(run: Run, folder: Path) -> None:
    """Raises UsageError where a finished cell was trained otherwise than is asked for now."""
    held = load_run_config(folder)
    for part in ("train", "loss"):
        if getattr(held, part, None) != getattr(run, part, None):
            raise UsageError(f"{folder}: was run with other settings of {part} (budget, grid or study); choose another --out")


def read_results(cells: Sequence[Cell], out: str | Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The results that are there."""
    paths = [cell_folder(out, cell.name, seed) / RESULT for cell in cells for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def cell_folder(out: str | Path, name: str, seed: int) -> Path:
    return Path(out) / name / f"seed-{seed}"


@contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Whether this process has the cell to itself while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def with_seed(run: Run, seed: int) -> Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))


def train_run(run: Run, out: str | Path) -> None:
    """Trains a configuration of any kind into a run folder, from where it stopped."""
    if isinstance(run, AutoencoderRun):
        train_autoencoder(run, out, quiet=True)
    elif isinstance(run, LatentLMRun):
        train_lm(run, out, quiet=True)
    else:
        train_token_lm(run, out, quiet=True)


# -- budgets ----------------------------------------------------------------------------------------------------------


def sized(run: Run, budget: float | None) -> Run:
    """The run with as many steps as `budget` FLOPs pay for, and what hangs on the number of steps scaled with it.

    Equal compute counts everything: the autoencoder that a latent model needs is paid for first.
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
    """The run with the steps at which terms of its loss come and go where they would be, had it `steps` steps."""
    if not isinstance(run, LatentLMRun):
        return run
    at = {name: getattr(run.loss, name) for name in ("auxiliary_decay_steps", "energy_from_step")}
    scaled: dict[str, Any] = {name: max(1, round(step * steps / run.train.steps)) for name, step in at.items() if step}
    return dataclasses.replace(run, loss=dataclasses.replace(run.loss, **scaled))


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
    """FLOPs that training the autoencoder of a latent model took; 0 for the other kinds, and for a model without a latent."""
    if not isinstance(run, LatentLMRun) or not run.model.has_latents:
        return 0.0
    stage_1 = load_run_config(run.autoencoder)
    if not isinstance(stage_1, AutoencoderRun):
        raise UsageError(f"autoencoder {run.autoencoder}: name the run that trained it, so that its compute can be counted")
    return flops_per_token(stage_1) * stage_1.train.steps * stage_1.train.batch_size * stage_1.train.num_tokens


def describe(name: str, seed: int, run: Run) -> dict[str, Any]:
    """What a cell is and what it cost."""
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
    """Every cell for every combination of dotted settings, such as `{"loss.auxiliary_weight": ["0", "1", "3"]}`.

    Raises:
        UsageError: a setting that the configuration does not have.
    """
    found = []
    for cell in cells:
        for values in itertools.product(*axes.values()):
            run, name = cell.run, cell.name
            for key, value in zip(axes, values, strict=True):
                run = configuration.from_dict(type(run), _nested(key, value), run, where=f"grid {key}={value}")
                name += f"-{key.rsplit('.', 1)[-1]}={value}"
            found.append(dataclasses.replace(cell, name=name, run=run))
    return found


def parse_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """`["loss.alpha=0.9,1"]` -> `{"loss.alpha": ["0.9", "1"]}`."""
    axes = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not key or not equals or not values:
            raise UsageError(f"--grid: expected KEY=VALUE,VALUE such as loss.auxiliary_weight=0,1,3, got {word!r}")
        axes[key] = values.split(",")
    return axes


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
