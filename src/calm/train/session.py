"""State of a training loop beside the parameters, and its periodic actions."""

import dataclasses
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from calm.errors import DivergedError, UsageError
from calm.train.checkpoint import Checkpoints
from calm.train.matrix_rate import devices
from calm.train.progress import Meter, Progress, describe
from calm.train.protocol import BatchStream, Evaluate, Params, Sample
from calm.train.run_folder import RunFolder, environment, read_records
from calm.train.settings import Resume, TrainConfig
from calm.train.steps import Leaves, TrainStep
from calm.train.tracker import RunTrackers, Tracker


@dataclasses.dataclass
class Position:
    """The loop's own numbers, saved with every checkpoint: with them a run that goes on repeats what it would have done."""

    records: int = 0
    """lines of metrics.jsonl"""
    evaluated: int = -1
    """the last step that was evaluated"""
    best_step: int | None = None
    best_value: float | None = None


class Session:
    """One process's stretch of a run: from the start, or the newest checkpoint, to the end or to whatever stops it."""

    def __init__(
        self,
        step: TrainStep,
        batches: BatchStream,
        config: TrainConfig,
        run: RunFolder,
        progress: Progress,
        meter: Meter,
        trackers: Sequence[Tracker],
        initial: Params | None = None,
    ):
        self.step_function, self.batches, self.config, self.run = step, batches, config, run
        self.progress, self.meter = progress, meter
        self.trackers = RunTrackers(run, trackers)
        self.initial = initial
        self.position = Position()
        self.last_record: dict[str, float] = {}
        self._checkpoints: Checkpoints | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """Open once the session has begun."""
        if self._checkpoints is None:
            raise RuntimeError("the session has not begun")
        return self._checkpoints

    # -- beginning and end ----------------------------------------------------------------------------------------------

    def begin(self, resume: Resume, config_text: str, meta: Mapping[str, Any]) -> tuple[int, Leaves]:
        """The step to start from and the state there; after this the folder holds the run's configuration and meta.json."""
        held = any(entry.name.isdigit() for entry in self.run.checkpoints.glob("*"))
        if held and resume.mode == "never":
            raise UsageError(f'{self.run.path}: already holds a run; choose another folder, or resume="auto" to go on with it')
        if held and resume.folder is not None:
            raise UsageError(f"{self.run.path}: already holds a run; a run that begins from {resume.folder} needs a new folder")
        recorded = self.run.metrics.is_file() and self.run.metrics.stat().st_size > 0
        if (held or recorded) and resume.mode != "force":
            self.run.check_config(config_text)
        self.run.create()
        self._checkpoints = Checkpoints(self.run.checkpoints, keep_last=self.config.keep_checkpoints)
        start, leaves = self._restore(resume)
        if start > self.config.steps:
            raise UsageError(f"{self.run.path}: is at step {start} already, and train.steps={self.config.steps}")
        self.run.truncate(self.run.metrics, self.position.records)
        self.run.truncate_at(self.run.timing, start)
        if timings := read_records(self.run.timing):
            self.meter.training_seconds = timings[-1]["training_seconds"]
        self._write_description(config_text, meta, start)
        for warning in getattr(self.step_function.objective, "warnings", ()):
            self.say(f"warning: {warning}")
        self.trackers.start(tomllib.loads(config_text), self.position.records)
        return start, leaves

    def end(self) -> None:
        """Waits for what is being written; called however the run ends."""
        try:
            if self._checkpoints is not None:
                self._checkpoints.close()
        finally:
            self.trackers.finish()

    def _restore(self, resume: Resume) -> tuple[int, Leaves]:
        if resume.folder is not None:
            other = Checkpoints(resume.folder / "checkpoints", reads_only=True)
            try:
                if not other.steps:
                    raise UsageError(f"{resume.folder}: holds no checkpoint to begin from")
                start, leaves = self._load(other, other.steps[-1] if resume.step is None else resume.step)
            finally:
                other.close()
            self.position = Position()
            self.say(f"begins from step {start} of {resume.folder}")
            return start, leaves
        if resume.step is not None:
            start, leaves = self._load(self.checkpoints, resume.step)
            self.checkpoints.drop_after(start)
            self.say(f"goes on from step {start}")
            return start, leaves
        for candidate in reversed(self.checkpoints.steps):
            try:
                start, leaves = self._load(self.checkpoints, candidate)
            except (UsageError, MemoryError):
                raise
            except Exception as error:  # cut short by something worse than a kill: the one before it is as good
                self.say(f"warning: the checkpoint of step {candidate} cannot be read and is left out ({type(error).__name__})")
                continue
            self.checkpoints.drop_after(start)
            self.say(f"goes on from step {start}")
            return start, leaves
        if self.checkpoints.steps:
            raise UsageError(f"{self.run.checkpoints}: none of the checkpoints can be read")
        initial, self.initial = self.initial, None  # kept nowhere else
        return 0, self.step_function.init(jax.random.key(self.config.seed), initial)

    def _load(self, checkpoints: Checkpoints, step: int) -> tuple[int, Leaves]:
        state, loop = checkpoints.restore(step, _parts(self.step_function.abstract))
        position = loop.get("position", {})
        self.position = Position(**position)
        self.batches.restore({name: int(value) for name, value in loop["batches"].items()})
        checkpoints.protect(self.position.best_step)
        restored = self.step_function.abstract._replace(params=state["params"], average=state["average"], **state["training"])
        return step, self.step_function.leaves(restored)

    def _write_description(self, config_text: str, meta: Mapping[str, Any], start: int) -> None:
        if self.run.config.exists() and (old := self.run.config.read_text(encoding="utf-8")) != config_text:
            self.run.write(self.run.path / f"config.before-{start}.toml", old)
        self.run.write_config(config_text)
        here = environment()
        before = self.run.read_meta()
        session = {"time": here["time"], "argv": here["argv"], "from_step": start, "devices": devices()}
        first = {key: value for key, value in before.items() if key in ("time", "argv")}
        self.run.write_meta(
            here | {"devices": devices()} | dict(meta) | first | {"sessions": [*before.get("sessions", []), session]}
        )

    # -- once in a while ------------------------------------------------------------------------------------------------

    def check_finite(self, leaves: Leaves) -> None:
        """Stops a run whose loss stopped being finite, at whichever step since the last look. Waits for the device."""
        bad_step = int(self.step_function.state(leaves).bad_step)
        if bad_step < 0:
            return
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        kept = f"the checkpoint of step {steps[-1]} is from before" if steps else "there is no checkpoint yet"
        message = f"{self.run.path}: the loss or its gradient was not finite at step {bad_step}; {kept}"
        self.run.log(message)
        hint = getattr(self.step_function.objective, "divergence_hint", "")
        advice = "A lower optimizer.learning_rate or a longer optimizer.warmup_steps may help"
        raise DivergedError(f"{message}. {advice}{f' ({hint})' if hint else ''}")

    def save(self, step: int, leaves: Leaves) -> None:
        """A checkpoint of the state before `step`, unless there is one, or the loss was not finite."""
        self.check_finite(leaves)
        with self.meter.pause():
            if step in self.checkpoints.steps:
                return
            self.position.records = self.trackers.records
            loop = {"batches": dict(self.batches.state), "position": dataclasses.asdict(self.position)}
            self.checkpoints.save(step, _parts(self.step_function.state(leaves)), loop)
            self.run.log(f"saves the checkpoint of step {step}")

    def evaluate(self, step: int, leaves: Leaves, evaluate: Evaluate) -> None:
        """Scores the parameters; the best so far are saved, and named in best.json."""
        self.check_finite(leaves)
        start = time.perf_counter()
        with self.meter.pause():
            scores = evaluate(self.step_function.state(leaves).best_params, step)
        named = {name if "/" in name else f"valid/{name}": value for name, value in scores.items()}
        curves = {name: value for name, value in named.items() if isinstance(value, list)}
        record = {name: float(value) for name, value in named.items() if not isinstance(value, list)}
        self.trackers.log(record | curves, step)
        self.last_record |= record
        self.position.evaluated = step
        words = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
        self.say(f"step {step}: {words}  ({time.perf_counter() - start:.1f} s)")
        if self._is_best(record):
            self.position.best_step, self.position.best_value = step, record[self.config.best_metric]
            self.checkpoints.protect(step)
            self.save(step, leaves)
            self.checkpoints.wait()  # best.json never names a checkpoint that is not there
            best = {"step": step, "metric": self.config.best_metric, "value": self.position.best_value}
            self.run.write(self.run.best, json.dumps(best) + "\n")

    def _is_best(self, record: Mapping[str, float]) -> bool:
        name = self.config.best_metric
        if not name:
            return False
        if name not in record:
            raise UsageError(f"train.best_metric is {name!r}, and the evaluation gives {', '.join(record) or 'nothing'}")
        value, best = record[name], self.position.best_value
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.config.best_is == "lowest" else value > best)

    def sample(self, step: int, leaves: Leaves, sample: Sample) -> None:
        """Text from the model, for people."""
        path = self.run.samples / f"{step}.txt"
        self.check_finite(leaves)
        with self.meter.pause():
            self.run.write(path, sample(self.step_function.state(leaves).best_params, step))
            if self.run.writes:
                self.trackers.artifact(path)

    def record(self, step: int, leaves: Leaves) -> None:
        """The means of all metrics since the last record. The one place in which the loop waits for the device."""
        self.check_finite(leaves)
        state = self.step_function.state(leaves)
        sums, count = jax.device_get((state.sums, state.count))
        throughput, flops = self.meter.read(), (step + 1) * self.meter.flops_per_step
        record = {f"train/{name}": float(total / count) for name, total in sums.items()}
        record["train/learning_rate"] = float(self.step_function.learning_rate(step))
        self.last_record |= record
        self.trackers.log(record, step)
        if throughput is not None:
            timing = {"training_seconds": self.meter.training_seconds, "training_flops": flops, **throughput._asdict()}
            self.trackers.log_timing({name: value for name, value in timing.items() if value is not None}, step)
        self.run.log(f"step {step}: {describe(record['train/loss'], throughput, self.config.steps - step, flops)}")
        self.progress.update(step, record["train/loss"], throughput, flops)

    def say(self, text: str) -> None:
        """To log.txt and to whoever watches."""
        if self.run.writes:
            self.run.log(text)
            self.progress.line(text)


def _parts(state: Any) -> dict[str, Any]:
    """The training state as the parts of a checkpoint: parameters apart, so that they can be read without the rest."""
    rest = state._asdict()
    return {"params": rest.pop("params"), "average": rest.pop("average"), "training": rest}
