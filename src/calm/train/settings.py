"""The configuration of a training run, and the two choices that depend on what its folder already holds."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import multihost_utils

from calm.core.dense import Precision
from calm.errors import UsageError
from calm.train.matrix_rate import MatrixRates, choose_precision, machine_rates
from calm.train.mesh import MeshConfig
from calm.train.optim import OptimizerConfig
from calm.train.run_folder import RunFolder
from calm.train.steps import StepConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an objective is trained. What is trained, and on what text, is said elsewhere.

    A schedule `*_every` of 0 means never, except that the last state is always saved and evaluated.
    """

    steps: int = 10_000
    """updates of the whole run"""
    batch_size: int = 32
    """rows of one update, over all hosts and microbatches"""
    num_tokens: int = 1024
    """tokens T in a row"""
    accumulation: int = 1
    """microbatches A of one update: less memory for the same result"""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema_decay: float = 0.0
    """decay of a moving average of the parameters, which is then what is evaluated and exported; 0 = none"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = the faster one on this machine, by a probe of a second; a run that goes on keeps what it began with"""
    seed: int = 0
    """of the parameters and of all randomness in the loss"""
    log_every: int = 10
    """steps between records, each a mean over the steps since the one before"""
    evaluate_every: int = 500
    sample_every: int = 0
    save_every: int = 500
    """steps between checkpoints: at most so many are lost in a crash"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept; the best one is kept beside them"""
    best_metric: str = ""
    """name of the evaluation's metric by which the best checkpoint is known, such as "valid/loss"; empty = none is"""
    best_is: Literal["lowest", "highest"] = "lowest"
    trackers: tuple[str, ...] = ()
    """besides the run folder: tensorboard, trackio, or package.module:Class"""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_tokens", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < (least := 0 if name == "save_every" else 1):
                raise UsageError(f"train: {name} must be at least {least}, got {getattr(self, name)}")
        if self.evaluate_every < 0 or self.sample_every < 0:
            raise UsageError("train: evaluate_every and sample_every cannot be negative (0 = only at the end)")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"train: ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.batch_size % self.accumulation:
            raise UsageError(f"train: batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")

    def step_config(self) -> StepConfig:
        """The part of it that is compiled."""
        return StepConfig(
            total_steps=self.steps,
            batch_size=self.batch_size,
            num_tokens=self.num_tokens,
            optimizer=self.optimizer,
            accumulation=self.accumulation,
            ema_decay=self.ema_decay,
            log_every=self.log_every,
        )


def settle_precision(requested: str, folder: str | Path) -> tuple[Precision, MatrixRates | None]:
    """The precision of the run in `folder`, and the machine's rates: those recorded when it began, else by a probe.

    The objective is built with this precision, and both go to `train`, which records them. A run that goes on takes what is
    recorded, so that a probe in a busier moment cannot change its numbers.
    """
    meta = RunFolder(folder, writes=False).read_meta()
    recorded = meta.get("matrix_rates")
    rates = MatrixRates(**recorded) if recorded else machine_rates()
    if jax.process_count() > 1:  # every host must come to the same choice, and each has measured something else
        rates = MatrixRates(*map(float, multihost_utils.broadcast_one_to_all(tuple(rates))))
    if requested == "auto" and meta.get("precision"):
        return choose_precision(meta["precision"], rates), rates
    return choose_precision(requested, rates), rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """How a run treats what its folder holds.

    auto        goes on from the newest checkpoint, or begins; a folder with a run of another configuration is refused
    never       begins; a folder with checkpoints is refused
    force       as auto, with the configuration of now whatever the folder's was
    STEP        goes on from that checkpoint of the folder; those after it are deleted
    PATH[@STEP] begins in a new folder from another run's checkpoint: its parameters, optimiser, data position and step
    """

    mode: Literal["auto", "never", "force"] = "auto"
    folder: Path | None = None
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Resume":
        if text in ("auto", "never", "force"):
            return cls(mode=text)  # pyrefly: ignore[bad-argument-type]
        if text.isdigit():
            return cls(step=int(text))
        path, separator, step = text.rpartition("@")
        path, step = (path, step) if separator and step.isdigit() else (text, "")
        folder = Path(path)
        if not (folder / "checkpoints").is_dir():
            raise UsageError(
                f"resume={text!r}: {folder} is not the folder of a run with checkpoints "
                "(choose auto, never, force, a step, or RUN@STEP)"
            )
        return cls(folder=folder, step=int(step) if step else None)
