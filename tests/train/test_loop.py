"""What can happen to a run: divergence, a full disk, hooks on schedule."""

import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from toy_training import CONFIG_TEXT, ToyBatches, ToyObjective, run

from calm.errors import CalmError, DivergedError, Preempted, UsageError
from calm.train.loop import TrainConfig, settle_precision
from calm.train.matrix_rate import MatrixRates
from calm.train.run_folder import best_step, read_records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two updates on two recorded schedules, with everything that leaves a file."""
    folder = tmp_path_factory.mktemp("finished")
    seen = []

    def evaluate(params, step):
        seen.append(step)
        return {"loss": 1.0, "other/score": 2.0}

    rates = MatrixRates(float32=1e9, bfloat16=2e9)
    options = {"steps": 6, "evaluate_every": 3, "sample_every": 4, "log_every": 2, "rates": rates, "facts": {"data": "sha"}}
    result = run(folder, evaluate=evaluate, sample=lambda params, step: f"text of {step}", precision="bfloat16", **options)
    return folder, result, seen


def test_hooks_run_on_schedule_and_at_the_end(finished):
    folder, result, seen = finished
    assert seen == [3, 6] and result.step == 6 and result.best_step == 3
    assert {file.name: file.read_text() for file in (folder / "samples").iterdir()} == {
        "4.txt": "text of 4",
        "6.txt": "text of 6",
    }
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records if "train/loss" in record] == [0, 2, 4, 5]
    assert [record["step"] for record in records if "valid/loss" in record and "other/score" in record] == [3, 6]
    assert set(records[0]) == {"step", "train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate"}


def test_the_folder_says_how_it_was_made(finished):
    folder, _, _ = finished
    meta = json.loads((folder / "meta.json").read_text())
    assert (folder / "config.toml").read_text() == CONFIG_TEXT
    assert {"argv", "versions", "devices", "seed", "git", "matrix_rates", "precision", "data", "time"} <= set(meta)
    assert meta["versions"]["jax"] and meta["devices"]["platform"] == "cpu" and meta["data"] == "sha"
    timing = read_records(folder / "timing.jsonl")
    assert timing and all(record["tokens_per_second"] > 0 and record["matrix_share"] > 0 for record in timing)


def test_precision_stays_what_the_run_began_with(finished, tmp_path):
    folder, _, _ = finished
    assert settle_precision("auto", folder) == ("bfloat16", MatrixRates(1e9, 2e9))
    assert settle_precision("float32", folder)[0] == "float32"


@pytest.mark.parametrize("bad_step", [0, 9, 23])
def test_divergence_names_the_step_and_saves_nothing_after_it(tmp_path, bad_step):
    with pytest.raises(DivergedError, match=f"not finite at step {bad_step};") as error:
        run(tmp_path, objective=ToyObjective(bad_step=bad_step), log_every=7, evaluate=None, best_metric="")
    assert "\n" not in str(error.value)
    saved = [int(entry.name) for entry in (tmp_path / "checkpoints").iterdir() if entry.name.isdigit()]
    assert all(step <= bad_step for step in saved) and len(saved) == min(2, bad_step // 5)
    assert all(record["train/loss"] is not None for record in read_records(tmp_path / "metrics.jsonl"))


def test_a_disk_full_of_records_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CalmError, match=r"metrics.jsonl: no space left to write") as error:
        run(tmp_path, resume="force")
    assert "\n" not in str(error.value)


def test_a_disk_full_of_checkpoints_is_one_line_and_the_run_goes_on_later(tmp_path):
    """A limit on the size of files stands for the disk: it fails the same calls, and needs no privileges."""
    big = {"objective": ToyObjective(dim=160), "best_metric": "", "evaluate": None}
    with pytest.raises(Preempted):
        run(tmp_path, ToyBatches(signal_number=signal.SIGTERM, signal_at=6), **big)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(CalmError, match="no space left to write") as error:
            run(tmp_path, **big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert best_step(tmp_path) == 7
    assert run(tmp_path, **big).step == 24


def test_batches_of_another_shape_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"shape \(8, 16\).*ask for \(8, 12\)"):
        run(tmp_path, ToyBatches(num_tokens=16))


def test_an_unknown_best_metric_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match=r"'valid/bleu', and the evaluation gives valid/loss, valid/digest"):
        run(tmp_path, best_metric="valid/bleu")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 6, "accumulation": 4}, "not a multiple of accumulation=4"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"evaluate_every": -1}, "evaluate_every"),
    ],
)
def test_nonsense_cannot_be_configured(values, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**values)


def test_training_learns(finished, tmp_path):
    result = run(Path(tmp_path), steps=60, evaluate=None, best_metric="", save_every=0, keep_checkpoints=1)
    losses = [record["train/loss"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0] and np.isfinite(losses).all() and result.step == 60
