"""An experiment's notebook: names, numbers and data sets, for scripts that do not go through `calm train`.

    tracker = ExperimentTracker("energy_head_width")
    data = load_dataset("pydoc", tokenizer="bpe:4096")
    tracker.log_hyperparams({"K": 4, "width": 512})
    tracker.log_metrics({"brier_lm": 5.72}, step=1000)

The files are those of a run folder, so that whatever reads runs reads these too.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from calm.errors import UsageError
from calm.text.prepare import prepare
from calm.text.shards import Data, open_data
from calm.train.run_folder import RunFolder, environment, read_records
from calm.train.tracker import RunTrackers, open_tracker


class ExperimentTracker:
    """Hyperparameters and metrics of one experiment, under FOLDER/name (FOLDER: $CALM_RUNS, else `runs`).

    An experiment of the same name goes on in the same files. `trackers` are names as in `calm.train.tracker.open_tracker`.
    """

    def __init__(self, name: str, *, folder: str | Path | None = None, trackers: Sequence[str] = ()):
        if not name or not re.fullmatch(r"[\w.+-]+", name):
            raise UsageError(f"an experiment's name is made of letters, digits and _ . + -, got {name!r}")
        self.run = RunFolder(Path(folder or os.environ.get("CALM_RUNS", "runs")) / name)
        self.run.create()
        self.run.write_meta(environment())
        self._hyperparams_file = self.run.path / "hyperparameters.json"
        records = read_records(self.run.metrics)
        self._step = 1 + max((record["step"] for record in records), default=-1)
        self._trackers = RunTrackers(self.run, [open_tracker(tracker) for tracker in trackers])
        self._trackers.start(self.hyperparams, len(records))

    @property
    def hyperparams(self) -> dict[str, Any]:
        """All that was logged so far."""
        if not self._hyperparams_file.exists():
            return {}
        return json.loads(self._hyperparams_file.read_text(encoding="utf-8"))

    def log_hyperparams(self, hyperparams: Mapping[str, Any]) -> None:
        """Adds to hyperparameters.json; a name that is there already is overwritten."""
        text = json.dumps(self.hyperparams | dict(hyperparams), indent=2, default=str)
        self.run.write(self._hyperparams_file, text + "\n")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A record of metrics.jsonl. Without a step, one after the last."""
        step = self._step if step is None else step
        self._trackers.log(metrics, step)
        self._step = step + 1

    def log_artifact(self, path: str | Path) -> None:
        """Hands a file to the trackers that keep files."""
        self._trackers.artifact(Path(path))

    def finish(self) -> None:
        self._trackers.finish()

    def __enter__(self) -> "ExperimentTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()


def load_dataset(
    name: str | Path, subset: str | None = None, *, tokenizer: str = "bpe:8192", cache: str | Path | None = None
) -> Data:
    """A data set as token shards, prepared on the first call and opened on every later one.

    Args:
        name: "pydoc" (needs no network), a file or folder of text, "hf:NAME", or the bare name of a data set on the hub.
        subset: the hub's name for a part of it.
        tokenizer: bytes, bpe:SIZE, or the path of a tokenizer.
        cache: where prepared data is kept; $CALM_HOME/data, else ~/.cache/calm/data.
    """
    source = str(name)
    if source != "pydoc" and not Path(source).exists() and not source.startswith("hf:"):
        source = f"hf:{source}"
    if subset is not None:
        if not source.startswith("hf:"):
            raise UsageError(f"load_dataset: {source!r} has no subsets (subset={subset!r}); only data sets of the hub have")
        source = f"{source}:{subset}"
    home = Path(os.environ.get("CALM_HOME", Path.home() / ".cache" / "calm"))
    folder = Path(cache or home / "data") / re.sub(r"[^\w.+-]+", "_", f"{source}-{tokenizer}").strip("_")
    prepare(source, folder, tokenizer, quiet=True)
    return open_data(folder)
