"""A run that was stopped, in whatever way, ends as one that was not: to the bit, in parameters, records and data position."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from calm.errors import Preempted, UsageError
from calm.train.checkpoint import Checkpoints, load_parameters, parameter_target
from calm.train.run_folder import best_step, read_records
from toy_training import CONFIG_TEXT, SAVE_EVERY, STEPS, ToyBatches, ToyObjective, evaluate, run


class Uninterrupted:
    def __init__(self, folder: Path):
        self.folder, self.batches = folder, ToyBatches()
        self.result = run(folder, self.batches)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted") / "run")


def assert_same_end(uninterrupted, folder, batches, result):
    for expected, found in zip(jax.tree.leaves(uninterrupted.result.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert (folder / "metrics.jsonl").read_bytes() == (uninterrupted.folder / "metrics.jsonl").read_bytes()
    assert batches.state == uninterrupted.batches.state
    assert result.best_step == uninterrupted.result.best_step
    assert best_step(folder) == best_step(uninterrupted.folder) == 12


def in_another_process(folder: Path, name: str, at: int) -> subprocess.CompletedProcess:
    program = Path(__file__).parent.parent / "toy_training.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), str(folder), name, str(at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("at", [1, 5, 11])  # before any checkpoint; where an evaluation is due; where the best is
def test_preempted_runs_go_on_to_the_same_end(uninterrupted, tmp_path, at):
    with pytest.raises(Preempted, match=f"SIGUSR1 after saving step {at + 1}"):
        run(tmp_path, ToyBatches(signal_number=signal.SIGUSR1, signal_at=at))
    batches = ToyBatches()
    assert_same_end(uninterrupted, tmp_path, batches, run(tmp_path, batches))


def test_sigterm_in_another_process_exits_75_and_goes_on(uninterrupted, tmp_path):
    stopped = in_another_process(tmp_path, "SIGTERM", 8)
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM" in stopped.stdout
    batches = ToyBatches()
    assert_same_end(uninterrupted, tmp_path, batches, run(tmp_path, batches))


def test_kill_9_loses_at_most_a_save_interval_and_never_the_run(uninterrupted, tmp_path):
    killed = in_another_process(tmp_path, "SIGKILL", 16)
    assert killed.returncode == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 16, "tra')  # as a kill within a write leaves it
    saved = max(int(entry.name) for entry in (tmp_path / "checkpoints").glob("*") if entry.name.isdigit())
    assert 16 - saved <= 2 * SAVE_EVERY  # the newest may still have been on its way to the disk
    batches = ToyBatches()
    assert_same_end(uninterrupted, tmp_path, batches, run(tmp_path, batches))


def test_the_average_is_what_is_evaluated_and_loaded_and_the_bare_parameters_go_on(uninterrupted, tmp_path):
    """Of the best checkpoint, evaluation saw the average; it holds both, since training goes on from the bare ones."""
    seen, shapes = {}, jax.eval_shape(ToyObjective().init, jax.random.key(0))

    def look(params, step):
        seen[step] = jax.device_get(params)
        return evaluate(params, step)

    run(tmp_path, evaluate=look)
    loaded = load_parameters(tmp_path / "checkpoints", best_step(tmp_path), shapes)
    for ours, theirs in zip(jax.tree.leaves(seen[12]), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    held = Checkpoints(tmp_path / "checkpoints", reads_only=True)
    bare = held.restore(12, {"params": parameter_target(shapes)})[0]["params"]
    held.close()
    assert float(np.abs(bare["layers"]["kernel"] - loaded["layers"]["kernel"]).max()) > 1e-3


def test_an_unreadable_newest_checkpoint_is_passed_over(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    for file in (folder / "checkpoints" / str(STEPS)).rglob("manifest.ocdbt"):
        file.write_bytes(b"torn")
    batches = ToyBatches()
    assert_same_end(uninterrupted, folder, batches, run(folder, batches))
    assert f"checkpoint of step {STEPS} cannot be read" in (folder / "log.txt").read_text()


def test_a_finished_run_stays_as_it_is(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    batches = ToyBatches()
    assert_same_end(uninterrupted, folder, batches, run(folder, batches))


def test_an_older_checkpoint_by_its_step_drops_those_after_it(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    batches = ToyBatches()
    assert_same_end(uninterrupted, folder, batches, run(folder, batches, resume="12"))
    assert "goes on from step 12" in (folder / "log.txt").read_text()


def test_the_last_checkpoints_and_the_best_are_kept(uninterrupted):
    kept = sorted(int(entry.name) for entry in (uninterrupted.folder / "checkpoints").iterdir() if entry.name.isdigit())
    assert kept == [12, 20, 24]


def test_a_new_run_begins_from_another_runs_checkpoint(uninterrupted, tmp_path):
    result = run(tmp_path, config_text="other = 1\n", resume=f"{uninterrupted.folder}@20")
    for expected, found in zip(jax.tree.leaves(uninterrupted.result.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert read_records(tmp_path / "metrics.jsonl")[0]["step"] == 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config_text": CONFIG_TEXT.replace("24", "30")}, r"train.steps is 24 there and 30 here"),
        ({"resume": "never"}, "already holds a run"),
        ({"resume": "7"}, "no checkpoint of step 7"),
        ({"resume": "/nowhere"}, "/nowhere is not the folder of a run"),
        ({"objective": ToyObjective(dim=4)}, r"'embed.embedding' has shape \(16, 8\) in the checkpoint and \(16, 4\) here"),
        ({"ema_decay": 0.0}, "average: the checkpoint also holds 'embed.embedding'"),
        ({"steps": 10, "resume": "force"}, "is at step 24 already"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused_in_one_line(uninterrupted, options, message):
    before = (uninterrupted.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=message) as error:
        run(uninterrupted.folder, **options)
    assert "\n" not in str(error.value)
    assert (uninterrupted.folder / "metrics.jsonl").read_bytes() == before


def test_force_takes_the_new_configuration_and_keeps_the_old_beside_it(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    assert run(folder, steps=26, config_text="other = 1\n", resume="force").step == 26
    assert (folder / "config.toml").read_text() == "other = 1\n"
    assert (folder / "config.before-24.toml").read_text() == CONFIG_TEXT


def test_parameters_alone_are_read_from_the_best_checkpoint(uninterrupted):
    target = ToyObjective().init(jax.random.key(0))
    params = load_parameters(uninterrupted.folder / "checkpoints", 24, target)
    for expected, found in zip(jax.tree.leaves(uninterrupted.result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(expected, found)
    with pytest.raises(UsageError, match="no checkpoint of step 3"):
        load_parameters(uninterrupted.folder / "checkpoints", 3, target)


def test_what_is_saved_beside_the_next_steps_is_the_state_before_them(tmp_path):
    """An asynchronous save reads its arrays while the step that follows writes into the memory that it was given."""
    checkpoints = Checkpoints(tmp_path)
    state = {"a": jax.numpy.zeros((512, 512))}
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for step in range(30):
        if step in (10, 20):
            checkpoints.save(step, {"params": state}, {})
        state = add(state)
    target = {"params": {"a": jax.ShapeDtypeStruct((512, 512), np.float32, sharding=state["a"].sharding)}}
    for step in (10, 20):
        assert (checkpoints.restore(step, target)[0]["params"]["a"] == step).all()
    checkpoints.close()
