"""Memory of a mixer: synthetic tasks, tiny models for each pattern of letters, and a table of accuracies.

The tasks ask for memory alone: the answers are random, so only a model that kept them can give them. A row is tokens `[T]`,
targets `[T]` and the positions that count: there the target is the answer, given the tokens up to and including that
position. The first ids of every vocabulary are the symbols to be remembered, followed by a blank and a cue.

Two levels of accuracy are exact. `chance`: each answer is uniform over `answers` symbols, whatever the token at its position
and the other answers of the row, so a model that mixes no positions cannot exceed it. `unordered`: the best of a model that
kept which symbols were shown and how often, but neither where nor with what.

A cell is a backbone of two layers of width 64 between an embedding and a softmax, trained on fresh rows of one task until it
answers 99.9 % of a round of 50 steps or its steps are over, and scored on 1024 rows of another seed. All cells have the same
widths, learning rate and rows, not the same number of weights; `budget` gives them the same FLOPs instead of the same steps.

Sources: the copying task of Hochreiter and Schmidhuber (1997) as in Arjovsky et al. 2016, arXiv:1511.06464; selective copying
and induction as in Gu and Dao 2023, arXiv:2312.00752 (the latter after Olsson et al. 2022, arXiv:2209.11895); multi-query
associative recall after Arora et al. 2023, arXiv:2312.04927, whose queries follow at distances drawn from a power law among
random tokens; here they may be at any place after the pairs, among blanks.
"""

import abc
import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from calm.core.transformer import TransformerConfig
from calm.errors import DivergedError, UsageError
from calm.evaluate.tables import table
from calm.hybrid.backbone import of_pattern
from calm.hybrid.hopfield import HopfieldConfig
from calm.registry import suggestion
from calm.rng import stream
from calm.studies.runner import cell_folder, variants
from calm.studies.scoring import over_seeds
from calm.studies.study import Request, cell_result
from calm.token.model import TokenLM, TokenLMConfig
from calm.token.softmax_head import SoftmaxHead
from calm.train.optim import OptimizerConfig

# -- tasks ------------------------------------------------------------------------------------------------------------

Tokens = Int[np.ndarray, "B T"]


class Batch(NamedTuple):
    """Rows of a task."""

    tokens: Tokens
    targets: Tokens
    """answers where `counted`, 0 elsewhere"""
    counted: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryTask(abc.ABC):
    """Random rows of one length."""

    name: ClassVar[str]
    least: ClassVar[dict[str, int]] = {"symbols": 2, "values": 2, "delay": 0}
    """least values of settings, where that is not 1"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (least := self.least.get(field.name, 1)):
                raise UsageError(f"{self.name}: {field.name} must be at least {least}, got {getattr(self, field.name)}")

    @property
    @abc.abstractmethod
    def answers(self) -> int:
        """Number of equally likely answers."""

    @property
    @abc.abstractmethod
    def shown(self) -> int:
        """Number of random symbols of a row that may be the answer, all equally likely."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of symbols, blank and cue included."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens T of a row."""

    @abc.abstractmethod
    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        """`batch` independent rows."""

    @property
    def chance(self) -> float:
        """Best accuracy without memory."""
        return 1 / self.answers

    @property
    def unordered(self) -> float:
        """Best accuracy with a memory of counts alone: always answering the most frequent symbol."""
        return most_frequent(self.shown, self.answers) / self.shown

    def draw(self, batch: int, *, seed: int | tuple[int, ...]) -> Batch:
        """`batch` rows, the same for the same seed."""
        return self.rows(batch, np.random.default_rng(seed))

    def _blanks(self, batch: int, blank: int) -> Batch:
        shape = (batch, self.length)
        return Batch(np.full(shape, blank, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyTask(MemoryTask):
    """Items among blanks, then a cue for each item, at which the items are asked for in their order."""

    symbols: int = 8
    items: int = 4

    @property
    def answers(self) -> int:
        return self.symbols

    @property
    def shown(self) -> int:
        return self.items

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @abc.abstractmethod
    def places(self, batch: int, generator: np.random.Generator) -> Int[np.ndarray, "B items"]:
        """Positions of the items, ascending."""

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._blanks(batch, blank=self.symbols)
        items = generator.integers(0, self.symbols, (batch, self.items), dtype=np.int32)
        np.put_along_axis(tokens, self.places(batch, generator), items, axis=-1)
        tokens[:, -self.items :] = self.symbols + 1
        targets[:, -self.items :], counted[:, -self.items :] = items, True
        return Batch(tokens, targets, counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedCopy(CopyTask):
    """The items come first and are followed by a delay."""

    delay: int = 32
    """blanks between the last item and the first cue"""

    name = "delayed copy"

    @property
    def length(self) -> int:
        return 2 * self.items + self.delay

    def places(self, batch: int, generator: np.random.Generator) -> Int[np.ndarray, "B items"]:
        return np.tile(np.arange(self.items), (batch, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(CopyTask):
    """The items are anywhere among the blanks, so that their distance is not fixed."""

    spread: int = 32
    """positions among which the items are"""

    name = "selective copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items > self.spread:
            raise UsageError(f"{self.name}: items={self.items} must not be more than spread={self.spread}")

    @property
    def length(self) -> int:
        return self.spread + self.items

    def places(self, batch: int, generator: np.random.Generator) -> Int[np.ndarray, "B items"]:
        return np.sort(generator.random((batch, self.spread)).argsort(-1)[:, : self.items], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(MemoryTask):
    """Random symbols with one cue among them; the row ends with the cue, and the symbol that followed it is asked for."""

    symbols: int = 16
    spread: int = 64
    """tokens before the last"""

    name = "induction"
    least: ClassVar[dict[str, int]] = {"symbols": 2, "spread": 2}

    @property
    def answers(self) -> int:
        return self.symbols

    @property
    def shown(self) -> int:
        return self.spread - 1

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def length(self) -> int:
        return self.spread + 1

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._blanks(batch, blank=self.symbols)
        tokens[:, :-1] = generator.integers(0, self.symbols, (batch, self.spread))
        place = generator.integers(0, self.spread - 1, (batch, 1))  # something follows it before the row ends
        np.put_along_axis(tokens, place, self.symbols, axis=-1)
        targets[:, -1:], counted[:, -1] = np.take_along_axis(tokens, place + 1, axis=-1), True
        return Batch(tokens, targets, counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(MemoryTask):
    """Multi-query associative recall: pairs of a key and a value, no key twice; then every key once more, in random order
    at random positions, where its value is asked for."""

    keys: int = 32
    """number of different keys"""
    values: int = 32
    pairs: int = 8
    spread: int = 0
    """tokens after the pairs, among which the queries are; 0 = as many as there are pairs"""

    name = "associative recall"
    least: ClassVar[dict[str, int]] = {"values": 2, "spread": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs <= self.keys:
            raise UsageError(f"{self.name}: pairs={self.pairs} must not be more than keys={self.keys}")
        if self.spread and self.spread < self.pairs:
            raise UsageError(f"{self.name}: spread={self.spread} must be 0 or at least pairs={self.pairs}")

    @property
    def answers(self) -> int:
        return self.values

    @property
    def shown(self) -> int:
        return self.pairs

    @property
    def vocab_size(self) -> int:
        return self.values + self.keys + 1

    @property
    def length(self) -> int:
        return 2 * self.pairs + (self.spread or self.pairs)

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._blanks(batch, blank=self.values + self.keys)
        keys = self.values + generator.random((batch, self.keys)).argsort(-1)[:, : self.pairs].astype(np.int32)
        values = generator.integers(0, self.values, (batch, self.pairs), dtype=np.int32)
        start = 2 * self.pairs
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        places = start + generator.random((batch, self.length - start)).argsort(-1)[:, : self.pairs]
        for row, entries in ((tokens, keys), (targets, values), (counted, True)):
            np.put_along_axis(row, places, entries, axis=-1)
        return Batch(tokens, targets, counted)


def most_frequent(draws: int, symbols: int) -> float:
    """Expected count of the most frequent of `symbols` in that many uniform draws.

    The counts are independent Poisson variables of mean draws / symbols, given their sum, so the distribution of their
    maximum follows from powers of a truncated Poisson distribution, without large numbers.
    """
    counts = np.arange(draws + 1)
    poisson, of_sum = stats.poisson.pmf(counts, draws / symbols), stats.poisson.pmf(draws, draws)
    expected = 0.0
    for most in range(draws):  # E max = sum over m of P(max > m)
        power, square, left = np.eye(1, draws + 1)[0], np.where(counts <= most, poisson, 0.0), symbols
        while left:
            power = np.convolve(power, square)[: draws + 1] if left % 2 else power
            square, left = np.convolve(square, square)[: draws + 1], left // 2
        expected += 1 - power[draws] / of_sum
    return expected


TASKS: dict[str, MemoryTask] = {
    "copy-16": DelayedCopy(delay=16),
    "copy-64": DelayedCopy(delay=64),
    "copy-256": DelayedCopy(delay=256),
    "selective-16": SelectiveCopy(spread=16),
    "selective-64": SelectiveCopy(spread=64),
    "induction-16": Induction(spread=16),
    "induction-64": Induction(spread=64),
    "induction-256": Induction(spread=256),
    "recall-4": AssociativeRecall(pairs=4),
    "recall-8": AssociativeRecall(pairs=8),
    "recall-16": AssociativeRecall(pairs=16),
    "recall-64": AssociativeRecall(keys=4096, values=4096, pairs=64, spread=384),
}
"""Tasks by name. `recall-64` has the vocabulary (8192), pairs and length (512) of the largest in Arora et al."""

# -- training ---------------------------------------------------------------------------------------------------------

ROUND = 50
ENOUGH = 0.999
SCORED_ROWS = 1024
TRAINING, SCORING = 0, 1

TINY = TransformerConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=4, inner_dim=128)
CONTEXT = HopfieldConfig(memory="context")
BACKBONES: dict[str, TransformerConfig] = {
    "A": TINY,
    "S": of_pattern(TINY, "S"),
    "C": of_pattern(TINY, "C"),
    "G": of_pattern(TINY, "G"),
    "H-slots": of_pattern(TINY, "H"),
    "H-context": of_pattern(TINY, "H", mixers={"H": CONTEXT}),
    "C,H-context": of_pattern(TINY, "C,H", mixers={"H": CONTEXT}),
    "SH": of_pattern(TINY, "SH"),
    "SHA": of_pattern(TINY, "SHA"),
}
STUDIED_TASKS = ("copy-16", "copy-64", "selective-16", "selective-64", "induction-16", "induction-64", "recall-4", "recall-16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRun:
    """Configuration of one cell."""

    task: str = "recall-4"
    """name in `TASKS`"""
    backbone: TransformerConfig = TINY
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.0)
    steps: int = 1000
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            known = ", ".join(TASKS)
            raise UsageError(f"memory: unknown task {self.task!r}{suggestion(self.task, TASKS)}; there are: {known}")
        if min(self.steps, self.batch_size) < 1:
            raise UsageError(f"memory: steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")

    @property
    def memory_task(self) -> MemoryTask:
        """The task called `task`."""
        return TASKS[self.task]

    @property
    def model(self) -> TokenLMConfig:
        """The backbone between an embedding and an untied softmax."""
        return TokenLMConfig(vocab_size=self.memory_task.vocab_size, backbone=self.backbone, tied=False)

    def flops(self) -> float:
        """Training FLOPs of a step; logits are computed where answers are asked for."""
        asked = int(self.memory_task.draw(1, seed=0).counted.sum())
        head = SoftmaxHead.flops(self.memory_task.vocab_size, self.backbone.dim, self.model.width)
        return 3.0 * self.batch_size * (self.memory_task.length * self.backbone.flops(self.memory_task.length) + asked * head)

    def within(self, budget: float | None) -> "MemoryRun":
        """The run with as many steps as `budget` training FLOPs pay for. Raises UsageError for none."""
        if budget is None:
            return self
        if (steps := int(budget / self.flops())) < 1:
            raise UsageError(f"memory: budget {budget:.3g} FLOPs is too little, a step of {self.task} costs {self.flops():.3g}")
        warmup = min(self.optimizer.warmup_steps, max(1, steps // 5))
        return dataclasses.replace(self, steps=steps, optimizer=dataclasses.replace(self.optimizer, warmup_steps=warmup))


class Questions(NamedTuple):
    """Rows, positions of each at which an answer is asked for, and the answers; any leading axes."""

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
    """Logits at the positions of the questions."""
    hidden, _ = model.hidden(jnp.asarray(rows.tokens)[..., None])
    return model.logits(jnp.take_along_axis(hidden, jnp.asarray(rows.places)[..., None], axis=1))


def train(run: MemoryRun) -> dict[str, Any]:
    """Trains and scores one cell.

    Returns:
        Accuracy and nats per answer on rows of another seed, the accuracy of every round of training, and the cost.

    Raises:
        DivergedError: the loss is not finite.
    """
    began, task = time.perf_counter(), run.memory_task
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

    backbones: tuple[str, ...] = tuple(BACKBONES)
    tasks: tuple[str, ...] = STUDIED_TASKS
    base: MemoryRun = MemoryRun()
    options: ClassVar[frozenset[str]] = frozenset(("budget", "grid"))

    def cells(self, request: Request) -> dict[str, MemoryRun]:
        """`TASK-BACKBONE` -> its run, for every combination of the grid's settings."""
        found = {}
        for task, backbone in itertools.product(self.tasks, self.backbones):
            run = dataclasses.replace(self.base, task=task, backbone=BACKBONES[backbone])
            for suffix, varied in variants(run, request.axes):
                found[f"{task}-{backbone}{suffix}"] = varied.within(request.budget)
        return found

    def run(self, request: Request) -> dict[str, Any]:
        cells, results = self.cells(request), []
        for seed, name in itertools.product(request.seeds, request.chosen(list(cells))):
            run = dataclasses.replace(cells[name], seed=seed)
            found = cell_result(cell_folder(request.out, name, seed), run, functools.partial(train, run), request.log)
            if found is not None:
                results.append({"cell": name, "backbone": name.removeprefix(f"{run.task}-"), **found})
                request.log(f"{name} seed {seed}: {found['accuracy']:.1%} after {found['steps']} steps")
        return request.written(results, f"{request.title}\n\n{summary_table(results)}")


def summary_table(results: Sequence[dict[str, Any]]) -> str:
    """Share of answers that are right, backbones by tasks, mean ± 95 % interval over seeds; below, the levels `unordered`
    and `chance` of each task."""
    tasks, backbones = (list(dict.fromkeys(result[name] for result in results)) for name in ("task", "backbone"))

    def cell(backbone: str, task: str) -> str:
        values = [result["accuracy"] for result in results if (result["backbone"], result["task"]) == (backbone, task)]
        return over_seeds(values) if values else "-"

    rows = [[backbone, *[cell(backbone, task) for task in tasks]] for backbone in backbones]
    rows.append(["symbols, not places", *[f"{TASKS[task].unordered:.3f}" for task in tasks]])
    rows.append(["chance", *[f"{TASKS[task].chance:.3f}" for task in tasks]])
    return table(["answers right", *tasks], rows, markdown=True)
