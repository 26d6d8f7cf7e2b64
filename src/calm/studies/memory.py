"""Which mixer remembers what: tiny models, one for each pattern of letters and task of memory, and a table of accuracies.

A cell is a backbone of two layers of width 64 between an embedding and a softmax, trained on fresh rows of one task
(`calm.studies.memory_tasks`) until it answers 99.9 % of a round of 50 steps or its steps are over, and scored on 1024 rows
of another seed. All cells have the same widths, learning rate and rows, not the same number of weights; `budget` gives them
the same FLOPs instead of the same steps.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm import config as configuration
from calm.config import suggestion
from calm.core.backbone import BackboneConfig
from calm.errors import DivergedError, UsageError
from calm.evaluate.tables import table
from calm.hybrid.hopfield import HopfieldConfig
from calm.rng import stream
from calm.studies.memory_tasks import PRESETS, MemoryTask
from calm.studies.runner import cell_folder
from calm.studies.scoring import over_seeds
from calm.studies.study import Request, cell_result
from calm.token.model import TokenLM, TokenLMConfig
from calm.token.softmax_head import SoftmaxHead
from calm.train.optim import OptimizerConfig

ROUND = 50
ENOUGH = 0.999
SCORED_ROWS = 1024
TRAINING, SCORING = 0, 1

TINY = BackboneConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=4, inner_dim=128)
CONTEXT = HopfieldConfig(memory="context")
BACKBONES: dict[str, BackboneConfig] = {
    "A": TINY,
    "S": dataclasses.replace(TINY, pattern="S"),
    "C": dataclasses.replace(TINY, pattern="C"),
    "G": dataclasses.replace(TINY, pattern="G"),
    "H-slots": dataclasses.replace(TINY, pattern="H"),
    "H-context": dataclasses.replace(TINY, pattern="H", hopfield=CONTEXT),
    "C,H-context": dataclasses.replace(TINY, pattern="C,H", hopfield=CONTEXT),
    "SH": dataclasses.replace(TINY, pattern="SH"),
    "SHA": dataclasses.replace(TINY, pattern="SHA"),
}
TASKS = ("copy-16", "copy-64", "selective-16", "selective-64", "induction-16", "induction-64", "recall-4", "recall-16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRun:
    """One cell: a backbone, a task, and how it is trained."""

    task: str = "recall-4"
    """a preset of `calm.studies.memory_tasks`"""
    backbone: BackboneConfig = TINY
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.0)
    steps: int = 1000
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in PRESETS:
            known = ", ".join(PRESETS)
            raise UsageError(f"memory: unknown task {self.task!r}{suggestion(self.task, PRESETS)}; there are: {known}")
        if min(self.steps, self.batch_size) < 1:
            raise UsageError(f"memory: steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")

    @property
    def rows(self) -> MemoryTask:
        """What it is trained on."""
        return PRESETS[self.task]

    @property
    def model(self) -> TokenLMConfig:
        """The backbone between a table and a softmax of its own."""
        return TokenLMConfig(vocab_size=self.rows.vocab_size, backbone=self.backbone, tied=False)

    def flops(self) -> float:
        """Training FLOPs of a step: logits are computed where something is asked."""
        asked = int(self.rows.draw(1, seed=0).counted.sum())
        head = SoftmaxHead.flops(self.rows.vocab_size, self.backbone.dim, self.model.width)
        return 3.0 * self.batch_size * (self.rows.length * self.backbone.flops(self.rows.length) + asked * head)

    def within(self, budget: float | None) -> "MemoryRun":
        """As many steps as `budget` training FLOPs pay for."""
        if budget is None:
            return self
        if (steps := int(budget / self.flops())) < 1:
            raise UsageError(f"memory: budget {budget:.3g} FLOPs is too little, a step of {self.task} costs {self.flops():.3g}")
        warmup = min(self.optimizer.warmup_steps, max(1, steps // 5))
        return dataclasses.replace(self, steps=steps, optimizer=dataclasses.replace(self.optimizer, warmup_steps=warmup))


class Questions(NamedTuple):
    """Rows, where something is asked in each, and the answers; any leading axes."""

    tokens: Int[Array | np.ndarray, "*b T"]
    places: Int[Array | np.ndarray, "*b Q"]
    answers: Int[Array | np.ndarray, "*b Q"]


def questions(task: MemoryTask, shape: tuple[int, ...], seed: tuple[int, ...]) -> Questions:
    """Rows of a task, `[*shape T]`."""
    tokens, targets, counted = task.draw(int(np.prod(shape)), seed=seed)
    places = np.nonzero(counted)[1].reshape(len(tokens), -1)
    answers = np.take_along_axis(targets, places, axis=-1)
    return Questions(*(part.reshape(*shape, -1).astype(np.int32) for part in (tokens, places, answers)))


def asked_logits(model: TokenLM, rows: Questions) -> Float[Array, "B Q V"]:
    """What the model says where something is asked."""
    hidden, _ = model.hidden(jnp.asarray(rows.tokens)[..., None])
    return model.logits(jnp.take_along_axis(hidden, jnp.asarray(rows.places)[..., None], axis=1))


def train(run: MemoryRun) -> dict[str, Any]:
    """Trains and scores one cell.

    Returns accuracy and nats per answer on rows of another seed, the accuracy of every round of training, and what it cost.

    Raises:
        DivergedError: the loss is not finite.
    """
    began, task = time.perf_counter(), run.rows
    model = run.model.build(rngs=nnx.Rngs(params=stream(jax.random.key(run.seed), "init")))
    graph, params = nnx.split(model)
    optimizer = run.optimizer.build(run.steps)

    def measure(params: Any, rows: Questions) -> tuple[Float[Array, ""], Float[Array, ""]]:
        logits = asked_logits(nnx.merge(graph, params), rows)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows.answers).mean()
        return nats, (logits.argmax(-1) == rows.answers).mean()

    @jax.jit
    def round_of_steps(params: Any, moments: Any, rows: Questions) -> tuple[Any, Any, Any]:
        def step(carry: Any, rows: Questions) -> tuple[Any, Any]:
            params, moments = carry
            measured, gradient = jax.value_and_grad(measure, has_aux=True)(params, rows)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), measured

        (params, moments), (nats, accuracy) = jax.lax.scan(step, (params, moments), rows)
        return params, moments, (nats, accuracy.mean())

    moments, curve, done = optimizer.init(params), [], 0
    while done < run.steps and (not curve or curve[-1] < ENOUGH):
        steps = min(ROUND, run.steps - done)
        rows = questions(task, (steps, run.batch_size), (run.seed, TRAINING, done))
        params, moments, (nats, accuracy) = round_of_steps(params, moments, rows)
        if not np.isfinite(nats).all():
            raise DivergedError(f"memory: {run.task}: the loss is not finite after {done} steps")
        curve.append(float(accuracy))
        done += steps
    nats, accuracy = jax.jit(measure)(params, questions(task, (SCORED_ROWS,), (run.seed, SCORING)))
    return {
        "task": run.task,
        "seed": run.seed,
        "accuracy": float(accuracy),
        "chance": task.chance,
        "unordered": task.unordered,
        "nats_per_answer": float(nats),
        "steps": done,
        "curve": curve,
        "tokens": done * run.batch_size * task.length,
        "training_flops": done * run.flops(),
        "parameters": run.model.parameters(),
        "seconds": time.perf_counter() - began,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryStudy:
    """Every backbone on every task."""

    summary: str = "which mixer remembers what: copying, selective copying, induction, associative recall"
    options: frozenset[str] = frozenset(("budget", "grid"))
    backbones: tuple[str, ...] = tuple(BACKBONES)
    tasks: tuple[str, ...] = TASKS
    base: MemoryRun = MemoryRun()

    def cells(self, request: Request) -> dict[str, MemoryRun]:
        """`TASK-BACKBONE` -> its run, for every combination of the grid's settings."""
        found = {}
        for task, backbone in itertools.product(self.tasks, self.backbones):
            run = dataclasses.replace(self.base, task=task, backbone=BACKBONES[backbone])
            for suffix, varied in _varied(run, request):
                found[f"{task}-{backbone}{suffix}"] = varied.within(request.budget)
        return found

    def run(self, request: Request) -> dict[str, Any]:
        cells, results = self.cells(request), []
        for seed, name in itertools.product(request.seeds, request.chosen(list(cells))):
            run = dataclasses.replace(cells[name], seed=seed)
            found = cell_result(cell_folder(request.out, name, seed), run, lambda run=run: train(run), request.say)
            if found is not None:
                results.append({"cell": name, "backbone": name.removeprefix(f"{run.task}-"), **found})
                request.say(f"{name} seed {seed}: {found['accuracy']:.1%} after {found['steps']} steps")
        return request.written(results, f"{request.name}: {self.summary}\n\n{summary_table(results)}")


def summary_table(results: Sequence[dict[str, Any]]) -> str:
    """The share of answers that is right, backbones by tasks, mean ± 95 % interval over seeds; below, what needs no memory,
    and what a memory of the symbols without their places gives."""
    tasks, backbones = (list(dict.fromkeys(result[name] for result in results)) for name in ("task", "backbone"))
    of: dict[tuple[str, str], list[float]] = {}
    for result in results:
        of.setdefault((result["backbone"], result["task"]), []).append(result["accuracy"])
    task_of = {task: PRESETS[task] for task in tasks}

    def cell(backbone: str, task: str) -> str:
        values = of.get((backbone, task))
        return over_seeds(values) if values else "-"

    rows = [[backbone, *[cell(backbone, task) for task in tasks]] for backbone in backbones]
    rows.append(["symbols, not places", *[f"{task_of[task].unordered:.3f}" for task in tasks]])
    rows.append(["chance", *[f"{task_of[task].chance:.3f}" for task in tasks]])
    return table(["answers right", *tasks], rows, markdown=True)


def _varied(run: MemoryRun, request: Request) -> Iterator[tuple[str, MemoryRun]]:
    """The run under every combination of the request's settings, and what its name ends with."""
    for values in itertools.product(*request.axes.values()):
        varied, suffix = run, ""
        for key, value in zip(request.axes, values, strict=True):
            setting: Any = value
            for part in reversed(key.split(".")):
                setting = {part: setting}
            varied = configuration.from_dict(MemoryRun, setting, varied, where=f"grid {key}={value}")
            suffix += f"-{key.rsplit('.', 1)[-1]}={value}"
        yield suffix, varied
