"""Training a critic: labelled text, as latents, and a small network that tells wanted from unwanted with calibrated odds.

Texts are lines; a line is cut into trajectories of at most N chunks, at every phase of the chunk for training. They are split
by line into what is trained on (8 tenths), what the temperature and the number of steps are chosen on (1) and what is reported
on (1).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.autoencoder import Autoencoder
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.text.tokenizer import Tokenizer
from calm.ttt.critic import TrainedCritic

SHUFFLED = "shuffled"
ROUNDS = 10
ROWS_AT_ONCE = 512
NOT_TEXT = {"readme", "license", "licence", "copying", "notice", "sources"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticTraining:
    """How a critic is trained."""

    width: int = 64
    chunks: int = 16
    """most chunks of a trajectory"""
    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.chunks, self.batch_size) < 1 or self.steps < ROUNDS:
            raise UsageError(f"critic: width, chunks and batch_size must be at least 1, and steps at least {ROUNDS}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise UsageError("critic: learning_rate must be above 0 and weight_decay at least 0")


class Trajectories(NamedTuple):
    """Labelled texts as latents; `length` chunks of each row count."""

    posterior: Any
    """of each chunk, `[R N Z]`"""
    length: Int[np.ndarray, "R"]
    label: Float[np.ndarray, "R"]
    """1 = wanted"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticReport:
    """What a critic does on lines that were not trained on."""

    trajectories: tuple[int, int, int]
    """trained on, chosen on, reported on"""
    accuracy: float
    majority: float
    """accuracy of always saying what is more frequent"""
    log_loss: float
    """nats"""
    calibration_error: float
    """expected calibration error over ten bins: the mean distance between said and found frequency"""
    calibration_error_raw: float
    """the same before the temperature"""
    temperature: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def line(self) -> str:
        """In words."""
        return (
            f"held-out accuracy {self.accuracy:.3f} (always the same: {self.majority:.3f}), log loss {self.log_loss:.3f}, "
            f"calibration error {self.calibration_error:.3f} (without temperature {self.calibration_error_raw:.3f}), "
            f"{self.trajectories[2]} trajectories"
        )


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines that are not blank, of a text file or of all files below a folder.

    Raises:
        UsageError: no such path, nothing in it, or not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{what} {path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_dir():
        files = [file for file in files if file.name[0] != "." and file.stem.lower() not in NOT_TEXT]
    lines: list[str] = []
    for file in files:
        try:
            lines += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UsageError(f"{what} {file}: not UTF-8 text") from error
    if not lines:
        raise UsageError(f"{what} {path}: holds no line of text")
    return lines


def train_critic(
    wanted: Sequence[str],
    unwanted: Sequence[str] | None,
    autoencoder: Autoencoder,
    tokenizer: Tokenizer,
    options: CriticTraining | None = None,
) -> tuple[TrainedCritic, CriticReport]:
    """A critic of lines of text. Without `unwanted` lines, the wanted ones with their chunks in another order are unwanted: a
    critic of what follows on what.

    Raises:
        UsageError: too few lines.
    """
    options = options or CriticTraining()
    generator, size = np.random.default_rng(options.seed), autoencoder.config.chunk_size
    parts: list[list[tuple[np.ndarray, float]]] = [[], [], []]
    for label, lines in ((1.0, wanted), (0.0, wanted if unwanted is None else unwanted)):
        ids = tokenizer.encode_batch(list(lines))
        order = np.random.default_rng(options.seed).permutation(len(ids))  # a line and its shuffled self: in the same part
        for place, line in enumerate(order):
            part = 0 if place < 0.8 * len(ids) else 1 if place < 0.9 * len(ids) else 2
            for row in trajectories(ids[line], size, options.chunks, every_phase=part == 0):
                if unwanted is None and len(row) < 3:
                    continue
                row = other_order(row, generator) if unwanted is None and not label else row
                parts[part].append((row, label))
    counts = [len(part) for part in parts]
    if min(counts) < 8 or any(len({label for _, label in part}) < 2 for part in parts):
        raise UsageError(
            f"critic: {len(wanted)} wanted and {len(wanted if unwanted is None else unwanted)} unwanted lines are too few to "
            f"train, choose and report on (of each at least 40, of {3 * size} tokens or more)"
        )
    train, chosen, held_out = (_encoded(autoencoder, part, options.chunks) for part in parts)
    critic = _fit(train, chosen, options)
    temperature = _temperature(_logits(critic, chosen), chosen.label)
    raw = _logits(critic, held_out)
    critic = dataclasses.replace(critic, temperature=jnp.float32(temperature))
    return critic, _report(raw, temperature, held_out.label, (counts[0], counts[1], counts[2]))


def trajectories(ids: Int[np.ndarray, "T"], size: int, most: int, *, every_phase: bool) -> list[Int[np.ndarray, "N K"]]:
    """The whole chunks of a line, in runs of at most `most`; once, or once for each phase."""
    rows = []
    for phase in range(size if every_phase else 1):
        chunks = ids[phase : phase + (len(ids) - phase) // size * size].reshape(-1, size)
        rows += [chunks[start : start + most] for start in range(0, len(chunks), most)]
    return rows


def other_order(chunks: Int[np.ndarray, "N K"], generator: np.random.Generator) -> Int[np.ndarray, "N K"]:
    """The same chunks in an order that is not theirs."""
    order = generator.permutation(len(chunks))
    return chunks[order if (order != np.arange(len(chunks))).any() else np.roll(order, 1)]


# -- fitting ----------------------------------------------------------------------------------------------------------


def _encoded(autoencoder: Autoencoder, rows: Sequence[tuple[np.ndarray, float]], most: int) -> Trajectories:
    graphdef, params = nnx.split(autoencoder)
    size = autoencoder.config.chunk_size
    chunks = np.zeros((len(rows), most, size), np.int32)
    for number, (row, _) in enumerate(rows):
        chunks[number, : len(row)] = row
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = chunks[start : start + ROWS_AT_ONCE]
        padded = np.pad(part, ((0, ROWS_AT_ONCE - len(part)), (0, 0), (0, 0)))
        parts.append(_posterior(graphdef, params, jnp.asarray(padded)))
    posterior = jax.tree.map(lambda *each: np.concatenate(each)[: len(rows)], *parts)  # only the last part was padded
    length = np.array([len(row) for row, _ in rows], np.int32)
    return Trajectories(posterior, length, np.array([label for _, label in rows], np.float32))


@partial(jax.jit, static_argnums=0)
def _posterior(graphdef: Any, params: Any, chunks: Int[Array, "R N K"]) -> Any:
    return nnx.merge(graphdef, params).encode(chunks)


def _fit(train: Trajectories, chosen: Trajectories, options: CriticTraining) -> TrainedCritic:
    """AdamW on draws of the posteriors; of ten times along the way, the one that is best on `chosen`."""
    means = np.asarray(train.posterior.mean)
    latents = means[np.arange(means.shape[1]) < train.length[:, None]]
    critic = _start(jax.random.key(options.seed), latents.mean(0), latents.std(0) + 1e-3, options.width)
    fixed = ("origin", "spread", "temperature")
    weights = {field.name: getattr(critic, field.name) for field in dataclasses.fields(critic) if field.name not in fixed}
    rounds = options.steps // ROUNDS
    schedule = optax.cosine_decay_schedule(options.learning_rate, ROUNDS * rounds)
    optimizer = optax.adamw(schedule, weight_decay=options.weight_decay)

    @jax.jit
    def some_steps(weights: Any, state: Any, key: PRNGKey, data: Trajectories) -> tuple[Any, Any]:
        def loss(weights: Any, key: PRNGKey) -> Float[Array, ""]:
            pick = jax.random.randint(stream(key, "rows"), (options.batch_size,), 0, len(data.label))
            latents = jax.tree.map(lambda x: x[pick], data.posterior).sample(stream(key, "latents"))
            logits = dataclasses.replace(critic, **weights).logit(latents, data.length[pick])
            return optax.sigmoid_binary_cross_entropy(logits, data.label[pick]).mean()

        def step(carry: Any, key: PRNGKey) -> tuple[Any, None]:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights, key), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), jax.random.split(key, rounds))[0]

    state, best, least = optimizer.init(weights), critic, np.inf
    data = jax.tree.map(jnp.asarray, train)
    for number in range(ROUNDS):
        weights, state = some_steps(weights, state, stream(jax.random.key(options.seed), "round", number), data)
        here = dataclasses.replace(critic, **weights)
        nats = _log_loss(_logits(here, chosen), chosen.label)
        if nats < least:
            best, least = here, nats
    return best


def _start(key: PRNGKey, origin: np.ndarray, spread: np.ndarray, width: int) -> TrainedCritic:
    size = 2 * len(origin)
    return TrainedCritic(
        origin=jnp.asarray(origin, jnp.float32),
        spread=jnp.asarray(spread, jnp.float32),
        pairs=jax.random.normal(stream(key, "pairs"), (size, width)) * size**-0.5,
        pairs_bias=jnp.zeros(width),
        inner=jax.random.normal(stream(key, "inner"), (width, width)) * width**-0.5,
        inner_bias=jnp.zeros(width),
        out=jnp.zeros(width),
        out_bias=jnp.zeros(()),
        temperature=jnp.ones(()),
    )


@jax.jit
def _mean_logits(critic: TrainedCritic, latents: Array, length: Array) -> Float[Array, "R"]:
    return critic.logit(latents, length)


def _logits(critic: TrainedCritic, data: Trajectories) -> Float[np.ndarray, "R"]:
    """Of posterior means."""
    return np.asarray(_mean_logits(critic, jnp.asarray(data.posterior.mean), jnp.asarray(data.length)), np.float64)


# -- calibration ------------------------------------------------------------------------------------------------------


def _log_loss(logits: Float[np.ndarray, "R"], label: Float[np.ndarray, "R"]) -> float:
    return float((np.logaddexp(0, logits) - logits * label).mean())


def _temperature(logits: Float[np.ndarray, "R"], label: Float[np.ndarray, "R"]) -> float:
    """The temperature of the least log loss, between 1/20 and 20."""
    candidates = np.exp(np.linspace(-np.log(20), np.log(20), 241))
    return float(min(candidates, key=lambda value: _log_loss(logits / value, label)))


def calibration_error(odds: Float[np.ndarray, "R"], label: Float[np.ndarray, "R"], bins: int = 10) -> float:
    """Expected calibration error of what is said of the wanted class, over bins of equal width."""
    place = np.minimum((odds * bins).astype(int), bins - 1)
    gaps = [abs(odds[place == b].sum() - label[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(label))


def _report(
    raw: Float[np.ndarray, "R"], temperature: float, label: Float[np.ndarray, "R"], trajectories: tuple[int, int, int]
) -> CriticReport:
    def odds(logits: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-logits))

    return CriticReport(
        trajectories=trajectories,
        accuracy=float(((raw > 0) == (label > 0)).mean()),
        majority=float(max(label.mean(), 1 - label.mean())),
        log_loss=_log_loss(raw / temperature, label),
        calibration_error=calibration_error(odds(raw / temperature), label),
        calibration_error_raw=calibration_error(odds(raw), label),
        temperature=temperature,
    )
