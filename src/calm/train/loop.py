"""The training loop: a list of once-in-a-whiles, then the step.

A step is named by the updates made before it: step 0's loss is that of the fresh parameters, the checkpoint and the evaluation
of step n are of the parameters after n updates, and the randomness of step n is `stream(key, "train", n)`.

What can happen to a long run, and what then happens here:

    killed at any moment    at most `save_every` steps are repeated, to the same numbers
    SIGTERM or SIGUSR1      saves between two steps and raises `Preempted` (exit 75): the same command goes on
    a loss not finite       raises `DivergedError` naming the step; no checkpoint from after it is written
    a full disk             one line; what is written is whole
    another configuration   refused, naming the first key that differs
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from calm.core.dense import Precision
from calm.errors import Preempted, UsageError
from calm.train.matrix_rate import MatrixRates
from calm.train.progress import Meter, Progress
from calm.train.protocol import BatchStream, Evaluate, Objective, Params, Sample
from calm.train.run_folder import RunFolder
from calm.train.session import Session
from calm.train.settings import Resume, TrainConfig, settle_precision
from calm.train.signals import StopRequest
from calm.train.steps import TrainStep
from calm.train.tracker import Tracker, open_tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run ended."""

    step: int
    params: Params
    """the parameters to use: the moving average where the run keeps one"""
    metrics: dict[str, float]
    """the last value of everything that was recorded in this process"""
    best_step: int | None
    best_value: float | None


def train(
    objective: Objective,
    batches: BatchStream,
    config: TrainConfig,
    folder: str | Path,
    *,
    config_text: str,
    attach: Callable[[], None] | None = None,
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
    trackers: Sequence[Tracker] = (),
    resume: str = "auto",
    precision: Precision = "float32",
    rates: MatrixRates | None = None,
    facts: Mapping[str, Any] | None = None,
    initial: Params | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains `objective` on `batches` into the run folder `folder`.

    Args:
        batches: this host's rows of each global batch; its position is saved and restored with the parameters.
        config_text: the resolved configuration as TOML, written to config.toml: what a later start must match.
        attach: writes what else belongs into the folder; called on the first host, once the folder is known to be this run's.
        evaluate: (parameters, step) -> scores, recorded as "valid/NAME" unless the name has a slash.
        sample: (parameters, step) -> text, written to samples/STEP.txt.
        trackers: besides those named in `config.trackers`.
        resume: see `Resume`.
        precision, rates: from `settle_precision`; recorded, and the yardstick of the progress line.
        initial: the parameters to begin with, in place of those of `objective.init`. A run that goes on has its own.
        facts: what else meta.json should say, such as fingerprints of data and tokenizer.
    Raises:
        UsageError, DivergedError, Preempted, CalmError (a full disk): see the module.
    """
    mesh = config.mesh.build()
    run = RunFolder(folder, writes=jax.process_index() == 0)
    how = Resume.parse(resume)
    trackers = [*map(open_tracker, config.trackers), *trackers]
    meta = {"seed": config.seed, "precision": precision, "matrix_rates": rates._asdict() if rates else None, **(facts or {})}
    meter = Meter(config.batch_size * config.num_tokens, objective.flops_per_token(), rates, precision, mesh.size)
    local_shape = (config.batch_size // jax.process_count(), config.num_tokens)

    with jax.set_mesh(mesh), StopRequest() as stop, Progress(config.steps, quiet=quiet or not run.writes) as progress:
        train_step = TrainStep(objective, config.step_config(), mesh, config.mesh)
        session = Session(train_step, batches, config, run, progress, meter, trackers, initial)
        try:
            start, leaves = session.begin(how, config_text, meta)
            if attach and run.writes:
                attach()
            for step in range(start, config.steps + 1):  # one turn more than steps: the last state is saved and evaluated
                last = step == config.steps
                if stop.requested(step):
                    session.save(step, leaves)
                    session.checkpoints.wait()
                    raise Preempted(f"{run.path}: stopped by {stop.name} after saving step {step}; the same command goes on")
                # Saving comes before evaluating: nothing that a hook does can cost the steps that led to it.
                if last or due(step, config.save_every):
                    session.save(step, leaves)
                if evaluate and (last or due(step, config.evaluate_every)) and session.position.evaluated != step:
                    session.evaluate(step, leaves, evaluate)
                if sample and (last or due(step, config.sample_every)):
                    session.sample(step, leaves, sample)
                if last:
                    break

                tokens = next(batches)
                if tokens.shape != local_shape:
                    raise UsageError(f"the batches have shape {tokens.shape}; batch_size and num_tokens ask for {local_shape}")
                leaves = train_step(leaves, tokens)
                if step == start:
                    jax.block_until_ready(leaves)
                    meter.restart()
                else:
                    meter.step()
                if step % config.log_every == 0 or step + 1 == config.steps:
                    session.record(step, leaves)
        finally:
            session.end()
    state, position = train_step.state(leaves), session.position
    return TrainResult(
        step=config.steps,
        params=state.best_params,
        metrics=session.last_record,
        best_step=position.best_step,
        best_value=position.best_value,
    )


def due(step: int, every: int) -> bool:
    """Whether something scheduled `every` steps happens before `step`: never at step 0, never if `every` is 0."""
    return every > 0 and step > 0 and step % every == 0


__all__ = ["TrainConfig", "TrainResult", "due", "settle_precision", "train"]
