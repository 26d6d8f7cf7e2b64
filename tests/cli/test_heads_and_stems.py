"""Every head and every stem through the commands: it trains, is evaluated, generates, and leaves and comes back as files."""

import json
from pathlib import Path

import pytest

import tiny
from calm.runs.stages import load_run_config

HEADS = {
    "flow": ("FlowHeadConfig", "num_steps = 2\nnum_draws = 2", "continuous"),
    "diffusion": ("DiffusionHeadConfig", "num_steps = 3\nnum_draws = 2", "both"),
    "mixture": ("MixtureHeadConfig", "num_components = 2\nnum_draws = 2", "discrete"),
}


def write_settings(path: Path, kind: str, sizes: str, stem: str) -> Path:
    path.write_text(f"""
[model]
stem = "{stem}"
[model.head]
kind = "{kind}"
num_blocks = 1
{sizes}
[loss]
energy_weight = 0
own_weight = 1
""")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_head_and_a_stem_go_through_every_command(name, tiny_runs, tmp_path):
    kind, _, stem = HEADS[name]
    settings, out = write_settings(tmp_path / "head.toml", *HEADS[name]), str(tmp_path / "lm")
    sources = ["--data", str(tiny_runs / "data"), "--autoencoder", str(tiny_runs / "autoencoder")]
    sizes = [*tiny.BACKBONE, *tiny.HEADS, *tiny.TRAIN, "--loss.num-samples", "2", "--model.head.num-blocks", "2"]
    tiny.run("train", "lm", "--config", str(settings), *sources, *sizes, "--out", out)
    model = load_run_config(out).model
    assert type(model.head).__name__ == kind and model.head.num_blocks == 2 and model.stem == stem
    records = [json.loads(line) for line in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()]
    assert {"train/own", "valid/energy_loss"} <= {key for record in records for key in record}
    assert "lm" in tiny.run("evaluate", out, "--num-samples", "2", "--max-tokens", "384")
    words = ["--prompt", "The", "--max-tokens", "8", "--seed", "1"]
    tiny.run("export", out, "--out", str(tmp_path / "export"))
    assert tiny.run("generate", out, *words)["texts"] == tiny.run("generate", str(tmp_path / "export"), *words)["texts"]


def test_an_unknown_head_and_a_size_of_another_head_are_refused(tiny_runs, tmp_path):
    sources = [
        "--data",
        str(tiny_runs / "data"),
        "--autoencoder",
        str(tiny_runs / "autoencoder"),
        "--out",
        str(tmp_path / "lm"),
    ]
    settings = write_settings(tmp_path / "head.toml", "flows", "", "discrete")
    code, _, err = tiny.calm("train", "lm", "--config", str(settings), *sources)
    assert code == 2 and "model.head.kind: expected one of" in err and "did you mean 'flow'" in err
    settings = write_settings(tmp_path / "head.toml", "FlowHeadConfig", "noise_dim = 3", "discrete")
    code, _, err = tiny.calm("train", "lm", "--config", str(settings), *sources)
    assert code == 2 and "unknown key 'model.head.noise_dim'" in err and not (tmp_path / "lm").exists()
    settings = write_settings(tmp_path / "head.toml", "FlowHeadConfig", "", "latent")
    code, _, err = tiny.calm("train", "lm", "--config", str(settings), *sources)
    assert code == 2 and "model.stem: expected" in err
