"""Where metrics go besides the run folder: a five-method protocol, two services behind extras, and anybody's own class.

The run folder's metrics.jsonl is always written, and failing to write it ends the run. A service that fails is told to the
person once and then left alone: no training is lost because a dashboard is.
"""

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from calm.errors import CalmError, UsageError, require_extra
from calm.train.protocol import Measured
from calm.train.run_folder import RunFolder


@runtime_checkable
class Tracker(Protocol):
    """One place that keeps metrics. Called by the first process only, in this order: start, any log and artifact, finish."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """The run begins, or goes on after an interruption, in `run_dir`."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step; a step may come several times with different names."""
        ...

    def artifact(self, path: Path) -> None:
        """A file of the run that is worth keeping with it."""
        ...

    def finish(self) -> None:
        """The run is over, or stopped."""
        ...


class TensorBoardTracker:
    """Event files under RUN/tensorboard."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._writer = require_extra("tensorboardX", "tensorboard").SummaryWriter(str(run_dir / "tensorboard"))
        lines = [f"    {key} = {value!r}" for key, value in config.items()]
        self._writer.add_text("config", "\n".join(lines))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def artifact(self, path: Path) -> None:
        if path.suffix in (".txt", ".md"):
            self._writer.add_text(path.parent.name, path.read_text(encoding="utf-8"))

    def finish(self) -> None:
        self._writer.close()


class TrackioTracker:
    """A local-first trackio project, named after the folder above the run; the run carries the name of its own folder."""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._trackio: Any = require_extra("trackio", "track")
        run_dir = run_dir.absolute()
        self._trackio.init(project=run_dir.parent.name or "calm", name=run_dir.name, config=dict(config), resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """Trackio keeps numbers; files stay in the run folder."""

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoardTracker, "trackio": TrackioTracker}


def open_tracker(name: str) -> Tracker:
    """A tracker by name, or by `package.module:Class` for a class of one's own that takes no arguments."""
    if name in TRACKERS:
        return TRACKERS[name]()
    module, separator, attribute = name.partition(":")
    if not separator:
        raise UsageError(f"trackers: unknown {name!r}; there are {', '.join(TRACKERS)}, and package.module:Class for your own")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"trackers: {name!r} cannot be loaded: {error}") from error


class RunTrackers:
    """The run folder's own files, then every other tracker."""

    def __init__(self, run: RunFolder, trackers: Sequence[Tracker]):
        self.run = run
        self._trackers = list(trackers) if run.writes else []

    @property
    def records(self) -> int:
        """Records written so far: with this number a checkpoint says where metrics.jsonl stood."""
        return self._records

    def start(self, config: Mapping[str, Any], records: int = 0) -> None:
        self._records = records
        for tracker in list(self._trackers):
            try:
                tracker.start(config, self.run.path)
            except CalmError:
                raise  # a missing extra, or a wrong name: better said now than after a day of training
            except Exception as error:
                self._drop(tracker, error)

    def log(self, metrics: Mapping[str, Measured], step: int) -> None:
        """A record of metrics.jsonl, and its numbers, without curves, to every tracker."""
        self.run.append(self.run.metrics, {"step": step, **metrics})
        self._records += 1
        self._each("log", {name: value for name, value in metrics.items() if not isinstance(value, list)}, step)

    def log_timing(self, timing: Mapping[str, float], step: int) -> None:
        """Writes timings to their own file, so that metrics.jsonl is the same in every repetition of a run."""
        self.run.append(self.run.timing, {"step": step, **timing})
        self._each("log", {f"timing/{name}": value for name, value in timing.items()}, step)

    def artifact(self, path: Path) -> None:
        self._each("artifact", path)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        line = f"warning: {type(tracker).__name__} failed and is left out of the rest of the run ({reason})"
        self.run.log(line)
        print(line, file=sys.stderr)
