"""Metrics reach every place they should, and a failing service costs nothing but itself."""

import json
import sys
import types
from pathlib import Path

import pytest

from calm.errors import MissingExtraError, UsageError
from calm.runs.harness import ExperimentTracker, load_dataset
from calm.train.run_folder import RunFolder, read_records
from calm.train.tracker import RunTrackers, open_tracker


class Recorder:
    """A third party's tracker. Fails in the method named by `fails`."""

    fails = ""

    def __init__(self):
        self.calls = []

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if name == self.fails:
            raise ConnectionError("no\nroute")

    def start(self, config, run_dir):
        self._note("start", dict(config), run_dir)

    def log(self, metrics, step):
        self._note("log", dict(metrics), step)

    def artifact(self, path):
        self._note("artifact", path)

    def finish(self):
        self._note("finish")


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def use(trackers, run):
    trackers.start({"a": 1})
    trackers.log({"x": 1.0}, 0)
    trackers.log_timing({"seconds": 2.0}, 0)
    trackers.log({"x": float("nan")}, 1)
    trackers.artifact(run.samples / "0.txt")
    trackers.finish()


def test_everything_goes_to_the_files_and_to_every_tracker(run):
    recorder = Recorder()
    trackers = RunTrackers(run, [recorder])
    use(trackers, run)
    assert read_records(run.metrics) == [{"step": 0, "x": 1.0}, {"step": 1, "x": None}] and trackers.records == 2
    assert read_records(run.timing) == [{"step": 0, "seconds": 2.0}]
    assert [call[0] for call in recorder.calls] == ["start", "log", "log", "log", "artifact", "finish"]
    assert recorder.calls[2] == ("log", {"timing/seconds": 2.0}, 0)


@pytest.mark.parametrize("fails", ["start", "log", "artifact", "finish"])
def test_a_failing_tracker_is_told_once_and_left_alone(run, capsys, fails):
    recorder = Recorder()
    recorder.fails = fails
    use(RunTrackers(run, [recorder]), run)
    assert recorder.calls[-1][0] == fails
    assert len(read_records(run.metrics)) == 2
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "Recorder failed" in warning and "no route" in warning
    assert run.text_log.read_text().count("Recorder failed") == 1


def test_other_processes_than_the_first_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", writes=False)
    run.create()
    recorder = Recorder()
    use(RunTrackers(run, [recorder]), run)
    assert not recorder.calls and not run.path.exists()


def test_trackers_are_opened_by_name(monkeypatch):
    module = types.ModuleType("their_tracker")
    module.Recorder = Recorder
    monkeypatch.setitem(sys.modules, "their_tracker", module)
    assert isinstance(open_tracker("their_tracker:Recorder"), Recorder)
    for name, message in (("wandb", "unknown 'wandb'"), ("their_tracker:Gone", "cannot be loaded"), ("no.such:X", "cannot")):
        with pytest.raises(UsageError, match=message):
            open_tracker(name)


def test_a_missing_extra_is_said_before_training(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'calm-lm\[track\]'"):
        RunTrackers(run, [open_tracker("trackio")]).start({})


def test_trackio_gets_the_run_under_its_own_names(run, monkeypatch):
    calls = []
    fake = types.ModuleType("trackio")
    for name in ("init", "log", "finish"):
        setattr(fake, name, lambda *args, _name=name, **kwargs: calls.append((_name, args, kwargs)))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    use(RunTrackers(run, [open_tracker("trackio")]), run)
    assert calls[0][2] == {"project": run.path.parent.name, "name": "run", "config": {"a": 1}, "resume": "allow"}
    assert calls[1] == ("log", ({"x": 1.0},), {"step": 0}) and calls[-1][0] == "finish"


def test_tensorboard_writes_event_files(run):
    pytest.importorskip("tensorboardX")
    run.write(run.samples / "0.txt", "text")
    use(RunTrackers(run, [open_tracker("tensorboard")]), run)
    assert any(file.stat().st_size for file in (run.path / "tensorboard").iterdir())
    assert "failed" not in (run.text_log.read_text() if run.text_log.exists() else "")


def test_an_experiment_goes_on_in_its_files(tmp_path):
    with ExperimentTracker("wide", folder=tmp_path) as tracker:
        tracker.log_hyperparams({"K": 4, "width": 512})
        tracker.log_metrics({"brier_lm": 5.0}, step=10)
        tracker.log_metrics({"brier_lm": 5.5})
    with ExperimentTracker("wide", folder=tmp_path) as tracker:
        tracker.log_hyperparams({"K": 2})
        tracker.log_metrics({"brier_lm": 6.0})
        assert tracker.hyperparams == {"K": 2, "width": 512}
    records = read_records(tmp_path / "wide" / "metrics.jsonl")
    assert [(record["step"], record["brier_lm"]) for record in records] == [(10, 5.0), (11, 5.5), (12, 6.0)]
    assert "versions" in json.loads((tmp_path / "wide" / "meta.json").read_text())
    with pytest.raises(UsageError, match="letters, digits"):
        ExperimentTracker("../up", folder=tmp_path)


def test_a_data_set_is_prepared_once(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} " * 20)
    data = load_dataset(text, tokenizer="bytes", cache=tmp_path / "cache")
    manifest = next(Path(tmp_path / "cache").rglob("manifest.json"))
    before = manifest.stat().st_mtime_ns
    again = load_dataset(text, tokenizer="bytes", cache=tmp_path / "cache")
    assert manifest.stat().st_mtime_ns == before
    assert again.split("train").num_tokens == data.split("train").num_tokens > 0
    with pytest.raises(UsageError, match="has no subsets"):
        load_dataset("pydoc", subset="15B", cache=tmp_path)
