"""The files of a run, the machine's rates, and what a person sees."""

import io
import json
import os
import subprocess

import pytest

from calm.errors import CalmError, UsageError
from calm.train import matrix_rate as machine
from calm.train.matrix_rate import MatrixRates, choose_precision, probe
from calm.train.progress import Meter, Progress, Throughput, describe, short
from calm.train.run_folder import RunFolder, best_step, first_difference, git_commit, out_of_space, read_records
from calm.train.settings import settle_precision


def test_records_survive_a_torn_last_line_but_not_a_torn_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert read_records(path) == [{"step": 0}, {"step": 1}]
    assert read_records(tmp_path / "none.jsonl") == []
    path.write_text('{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_records(path)


def test_truncation_keeps_whole_lines_only(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(5):
        run.append(run.metrics, {"step": step})
    run.truncate_at(run.metrics, 3)
    assert read_records(run.metrics) == [{"step": 0}, {"step": 1}, {"step": 2}]
    with open(run.metrics, "a") as file:
        file.write('{"st')
    run.truncate(run.metrics, 99)
    assert run.metrics.read_text().endswith('{"step": 2}\n')


def test_a_small_file_is_replaced_whole(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write_config("old = 1\n")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CalmError, match=r"config.toml: no space left"):
        run.write_config("new = 1\n")
    assert run.config.read_text() == "old = 1\n"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(CalmError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").create()


def test_a_full_disk_is_known_by_its_number_or_its_words():
    assert out_of_space(OSError(28, "x")) and out_of_space(ValueError("RESOURCE_EXHAUSTED: No space left on device"))
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(122, "quota")
    assert out_of_space(wrapped) and not out_of_space(OSError(2, "no such file"))


def test_the_first_key_that_differs_is_named():
    assert first_difference("a = 1\n[b]\nc = 2\n", "a = 1\n[b]\nc = 3\n") == ("b.c", "2", "3")
    assert first_difference("a = 1\nz = 0\n", "a = 1\n") == ("z", "0", "absent")
    assert first_difference("a = 1\nb = 2\n", "b = 2\na = 1\n") is None


def test_the_best_step_falls_back_on_the_last(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(UsageError, match="not the folder of a run"):
        best_step(tmp_path)
    for step in (2, 10):
        (run.checkpoints / str(step)).mkdir(parents=True)
    assert best_step(tmp_path) == 10
    run.write(run.best, json.dumps({"step": 2}))
    assert best_step(tmp_path) == 2
    run.write(run.best, json.dumps({"step": 4}))  # was dropped: a best.json from before a crash
    assert best_step(tmp_path) == 10


def test_outside_of_a_checkout_there_is_no_commit(tmp_path):
    assert git_commit(tmp_path) is None


def test_a_package_inside_somebody_s_repository_is_not_of_its_commit(tmp_path):
    def git(*words: str) -> None:
        names = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "file.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "theirs")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "file.py").write_text("")
    assert git_commit(tmp_path / "tracked") is not None and git_commit(tmp_path / "site-packages") is None


def test_the_faster_precision_is_chosen_unless_one_is_asked_for():
    assert choose_precision("auto", MatrixRates(4e11, 8e11)) == "bfloat16"
    assert choose_precision("auto", MatrixRates(4e11, 4.2e11)) == "float32"
    assert choose_precision("float32", MatrixRates(1.0, 9.0)) == "float32"
    with pytest.raises(UsageError, match="float16"):
        choose_precision("float16")


def test_a_process_probes_once_however_many_runs_it_begins(monkeypatch, tmp_path):
    probed = []
    monkeypatch.setattr(machine, "probe", lambda: probed.append(1) or MatrixRates(1e9, 2e9))
    machine.machine_rates.cache_clear()
    try:
        found = [settle_precision("auto", tmp_path / name) for name in ("one", "two")] + [choose_precision("auto")]
    finally:
        machine.machine_rates.cache_clear()  # what was planted is not this machine's
    assert found == [("bfloat16", MatrixRates(1e9, 2e9))] * 2 + ["bfloat16"] and len(probed) == 1


def test_the_probe_is_short_and_measures_both():
    rates = probe(((64, 64, 64),), seconds=0.05)
    assert rates.float32 > 0 and rates.bfloat16 > 0 and rates.of("bfloat16") == rates.bfloat16


def test_the_meter_leaves_out_what_is_not_training(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = Meter(100, 3.0, MatrixRates(1000.0, 2000.0), "float32", 2)
    assert meter.read() is None
    for _ in range(4):
        clock[0] += 0.5
        meter.step()
    with meter.pause():
        clock[0] += 60
    assert meter.read() == Throughput(0.5, 200.0, 200 * 3 / 2000) and meter.training_seconds == 2.0


def test_off_a_terminal_progress_is_plain_lines():
    stream = io.StringIO()
    with Progress(100, stream=stream) as progress:
        progress.update(40, 2.5, Throughput(0.5, 12_345.0, 0.25))
        progress.line("step 50: valid/loss 2")
    assert stream.getvalue().splitlines() == [
        "step 40/100  loss 2.5  12.3k tokens/s  25% of the matrix rate  0:00:30 left",
        "step 50: valid/loss 2",
    ]


def test_on_a_terminal_progress_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        progress.update(40, 2.5, Throughput(0.5, 12_345.0, None))
        progress.line("an [odd] line")
    assert "40/100" in stream.getvalue() and "an [odd] line" in stream.getvalue()


def test_numbers_are_short():
    assert [short(value) for value in (12.0, 1234.0, 5.6e6, 7e9)] == ["12", "1.23k", "5.6M", "7G"]
    assert describe(1.0, None, 3) == "loss 1"
    assert describe(1.0, None, 3, 1.2345e15) == "loss 1  1.23e15 FLOPs"
