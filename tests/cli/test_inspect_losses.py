"""`calm inspect losses`: a run with a gate and a direction term leaves its course as arrays, a table and a picture."""

import json

import numpy as np
import pytest

import tiny
from calm.errors import UsageError
from calm.evaluate.loss_curves import LossCourse
from calm.train.run_folder import RunFolder
from calm.train.tracker import RunTrackers

SETTINGS = """
[model]
stem = "continuous"
[model.head]
kind = "GatedEnergyHeadConfig"
num_blocks = 1
[loss]
num_samples = 2
direction_weight = 0.5
[train]
log_every = 1
evaluate_every = 2
"""


def record(step: int, at: str, **values: object) -> str:
    return json.dumps({"step": step, **{f"{at}/{name}": value for name, value in values.items()}})


def write_run(folder, *, gate: bool = True):
    """A run of 6 steps over 5 positions with known numbers, cut off in the middle of a line."""
    gated = {"gate_mean": 0.9} if gate else {}
    lines = []
    for step in range(6):
        numbers = dict(fidelity=6.0 - step, diversity=1.0, direction=None if step == 2 else 0.5, loss=11.0, **gated)
        lines.append(record(step, "train", **numbers))
        if step in (3, 5):
            curves = dict(fidelity_at=[float(step)] * 5) | ({"gate_histogram": [0.25] * 4} if gate else {})
            lines.append(record(step, "valid", **numbers, objective=10.0, **curves))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "tr']))
    return folder


def test_the_course_has_the_names_and_shapes_that_it_says(tmp_path):
    course = LossCourse.read(write_run(tmp_path / "run"))
    course.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        arrays = dict(file)
    shapes = {name: array.shape for name, array in arrays.items()}
    training = ["step", "loss", "d_fid", "d_div", "rf_loss", "gate_mean"]
    expected = {name: (6,) for name in training} | {f"valid_{name}": (2,) for name in training}
    assert shapes == expected | {"fidelity_per_step": (2, 5), "gate_histogram": (2, 4), "gate_edges": (5,)}
    np.testing.assert_array_equal(arrays["d_fid"], [6, 5, 4, 3, 2, 1])
    np.testing.assert_array_equal(np.isnan(arrays["rf_loss"]), np.arange(6) == 2)  # what was not finite is null there
    np.testing.assert_array_equal(arrays["valid_step"], [3, 5])
    np.testing.assert_array_equal(arrays["valid_loss"], [10, 10])
    np.testing.assert_array_equal(arrays["fidelity_per_step"], [[3] * 5, [5] * 5])
    (row,) = [line for line in course.table().splitlines() if line.startswith("fidelity")]
    assert row.split()[-3:] == ["6", "1", "1"]
    course.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    course = LossCourse.read(write_run(tmp_path / "run", gate=False))
    assert not {name for name in course.arrays if "gate" in name}
    course.plot(tmp_path / "run.png")
    (tmp_path / "run" / "metrics.jsonl").write_text(record(0, "train", loss=1.0))
    with pytest.raises(UsageError, match="metrics.jsonl: holds no fidelity; name a language model's run"):
        LossCourse.read(tmp_path / "run")
    with pytest.raises(UsageError, match="metrics.jsonl: No such file"):
        LossCourse.read(tmp_path)


@pytest.mark.slow
def test_a_run_with_gate_and_direction_goes_through_the_commands(tiny_runs, tmp_path):
    (tmp_path / "z.toml").write_text(SETTINGS)
    out = tmp_path / "lm"
    sources = ["--data", str(tiny_runs / "data"), "--autoencoder", str(tiny_runs / "autoencoder"), "--out", str(out)]
    sizes = [*tiny.BACKBONE, *tiny.HEADS, *tiny.TRAIN]
    result = tiny.run("train", "lm", "--config", str(tmp_path / "z.toml"), *sources, *sizes)
    assert {"train/direction", "valid/fidelity", "valid/gate_mean"} <= set(result) and "valid/fidelity_at" not in result
    found = tiny.run("inspect", "losses", str(out), "--out", str(tmp_path / "files" / "course.npz"))
    with np.load(found["file"], allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["step"], range(4))
        np.testing.assert_array_equal(arrays["valid_step"], [2, 4])
        energy = 2 * arrays["d_fid"] - arrays["d_div"]
        np.testing.assert_allclose(arrays["loss"], energy + 0.5 * arrays["rf_loss"], rtol=1e-4)
        assert arrays["fidelity_per_step"].shape == (2, 192 // 4 - 1)
        np.testing.assert_allclose(arrays["fidelity_per_step"].mean(1), arrays["valid_d_fid"], rtol=1e-4)
        np.testing.assert_allclose(arrays["gate_histogram"].sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(arrays["gate_mean"][0], 1 / (1 + np.exp(-4)), rtol=1e-4)  # where the gate starts
    assert (tmp_path / "files" / "course.png").stat().st_size > 10_000
    words = ["--prompt", "The", "--max-tokens", "8", "--seed", "1"]
    tiny.run("export", str(out), "--out", str(tmp_path / "export"))
    texts = [tiny.run("generate", folder, *words)["texts"] for folder in (str(out), str(tmp_path / "export"))]
    assert texts[0] == texts[1]
    code, _, err = tiny.calm("inspect", "losses", str(out), "--out", "course.txt")
    assert code == 2 and "--out course.txt: name a file that ends in .npz" in err


def test_curves_stay_in_the_file_and_trackers_get_numbers(tmp_path):
    """Services that keep numbers would fail on a list, and be left out of the rest of the run."""
    seen = []

    class Numbers:
        def start(self, config, run_dir):
            pass

        def log(self, metrics, step):
            seen.append((step, {name: float(value) for name, value in metrics.items()}))

        def artifact(self, path):
            pass

        def finish(self):
            pass

    trackers = RunTrackers(RunFolder(tmp_path), [Numbers()])
    trackers.start({})
    trackers.log({"valid/fidelity": 1.5, "valid/fidelity_at": [1.0, 2.0]}, 7)
    assert seen == [(7, {"valid/fidelity": 1.5})]
    (kept,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == {"step": 7, "valid/fidelity": 1.5, "valid/fidelity_at": [1.0, 2.0]}
