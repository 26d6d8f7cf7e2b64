"""The commands from text to a measured, generating model, each once, with the smallest settings; and what bad input does."""

import json
import shutil
from pathlib import Path

import pytest

import tiny
from calm import config
from calm.runs.stages import LatentLMRun, load_run_config


def test_a_run_folder_holds_what_alone_reproduces_it(tiny_runs, tmp_path):
    lm = tiny_runs / "lm"
    names = {"config.toml", "meta.json", "metrics.jsonl", "log.txt", "tokenizer.json", "checkpoints", "autoencoder"}
    assert names <= {path.name for path in lm.iterdir()}
    run = config.load(LatentLMRun, [lm / "config.toml"])
    assert run == load_run_config(lm) and run.train.steps == 4 and run.model.vocab_size == 259
    again = tiny.run("train", "lm", "--config", str(lm / "config.toml"), "--out", str(tmp_path / "again"))
    first = json.loads((lm / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["valid/energy_loss"] == first["valid/energy_loss"]


def test_evaluate_scores_both_stages_beside_the_baselines(tiny_runs, tmp_path):
    out = tmp_path / "scores.json"
    scores = tiny.run("evaluate", str(tiny_runs / "lm"), "--split", "test", "--num-samples", "4", "--out", str(out))
    assert {"autoencoder", "lm", "unigram", "bigram", "against_bigram"} <= set(scores)
    assert json.loads(out.read_text()) == scores
    assert set(tiny.run("evaluate", str(tiny_runs / "autoencoder"), "--max-tokens", "128")) == {"autoencoder", "flops"}


def test_generate_streams_one_prompt_and_batches_several(tiny_runs, tmp_path, capsys):
    from calm.cli import main

    words = ["generate", str(tiny_runs / "lm"), "--max-tokens", "8", "--seed", "3"]
    file = tmp_path / "prompt.txt"
    file.write_text("The cat")
    both = tiny.run(*words, "--prompt", "The cat", "--prompt", "A", "--out", str(tmp_path / "texts.txt"))
    assert both["prompts"] == ["The cat", "A"] and all(count <= 8 for count in both["tokens"])
    assert (tmp_path / "texts.txt").read_text().startswith("The cat" + both["texts"][0])
    assert tiny.run(*words, "--prompt-file", str(file))["texts"] == tiny.run(*words, "--prompt", "The cat")["texts"]
    assert main([*words, "--prompt", "The cat"]) == 0
    assert capsys.readouterr().out.startswith("The cat")
    half = tiny.run(*words, "--temperature", "0.5", "--candidates", "4")
    assert half["prompts"] == [""] and 0 <= half["fallback_share"][0] <= 1


def test_an_export_generates_what_the_run_generates(tiny_runs, tmp_path):
    files = tiny.run("export", str(tiny_runs / "lm"), "--out", str(tmp_path / "export"))["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "autoencoder/model.safetensors"} <= set(files)
    words = ["--prompt", "The", "--max-tokens", "8"]
    run, export = (tiny.run("generate", str(folder), *words) for folder in (tiny_runs / "lm", tmp_path / "export"))
    assert run["texts"] == export["texts"]


def fails(code: int, *parts: str, words: list[str]) -> None:
    found, result, err = tiny.calm(*words)
    assert found == code and result["exit_code"] == code, err
    line = err.splitlines()[-1]
    assert line.startswith("calm: ") and result["error"] in line and "internal error" not in line
    assert all(part in line for part in parts), line


def train_lm(folder: Path, out: Path, *words: str) -> list[str]:
    runs = ["--data", str(folder / "data"), "--autoencoder", str(folder / "autoencoder"), "--out", str(out)]
    return ["train", "lm", *runs, *tiny.LM, *words]


def test_unknown_presets_and_keys_are_named_with_the_nearest(tiny_runs, tmp_path):
    fails(2, "unknown preset 'quickstrat'", "'quickstart'", words=train_lm(tiny_runs, tmp_path, "--preset", "quickstrat"))
    fails(
        2, "--model.backbone.dimm", "'--model.backbone.dim'", words=train_lm(tiny_runs, tmp_path, "--model.backbone.dimm", "3")
    )
    (tmp_path / "bad.toml").write_text("[train]\nstepz = 1\n")
    bad = train_lm(tiny_runs, tmp_path, "--config", str(tmp_path / "bad.toml"))
    fails(2, "bad.toml: unknown key 'train.stepz'", "'train.steps'", words=bad)
    fails(2, "steps", "whole number", words=train_lm(tiny_runs, tmp_path, "--train.steps", "many"))


def test_a_chunk_size_that_does_not_divide_the_block_is_refused(tiny_runs, tmp_path):
    words = ["train", "autoencoder", "--data", str(tiny_runs / "data"), "--out", str(tmp_path / "run"), *tiny.AUTOENCODER]
    fails(2, "chunk_size 5", "192", words=[*words, "--model.chunk-size", "5"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_that_is_missing_or_too_short_is_refused(tiny_runs, tmp_path):
    words = ["train", "autoencoder", "--out", str(tmp_path / "run"), *tiny.AUTOENCODER]
    fails(2, "data", words=words)
    fails(2, "nowhere", words=[*words, "--data", str(tmp_path / "nowhere")])
    fails(2, "tokens", "block", words=[*words, "--data", str(tiny_runs / "data"), "--train.num-tokens", "64k"])
    for name, content in (("empty.txt", b""), ("binary.txt", bytes(range(256)) * 20)):
        (tmp_path / name).write_bytes(content)
        words = ["data", "prepare", "--source", str(tmp_path / name), "--out", str(tmp_path / "data"), "--tokenizer", "bytes"]
        fails(2, name, words=words)


def test_another_configuration_does_not_go_into_a_run_folder(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs / "lm", tmp_path / "lm")
    before = (tmp_path / "lm" / "metrics.jsonl").read_bytes()
    fails(2, "loss.alpha", str(tmp_path / "lm"), words=train_lm(tiny_runs, tmp_path / "lm", "--loss.alpha", "1.5"))
    assert (tmp_path / "lm" / "metrics.jsonl").read_bytes() == before
    fails(2, str(tmp_path / "lm"), words=train_lm(tiny_runs, tmp_path / "lm", "--resume", "never"))


def test_a_tokenizer_that_does_not_match_is_refused(tiny_runs, tmp_path):
    data = str(tmp_path / "bpe")
    tiny.run("data", "prepare", "--source", str(tiny_runs / "text"), "--out", data, "--tokenizer", "bpe:300")
    fails(2, "tokenizer", words=train_lm(tiny_runs, tmp_path / "run", "--data", data))
    fails(2, "tokenizer", words=["evaluate", str(tiny_runs / "lm"), "--data", data])


def test_missing_runs_and_checkpoints_are_named(tiny_runs, tmp_path):
    fails(2, "nowhere", words=["evaluate", str(tmp_path / "nowhere")])
    fails(2, "autoencoder", words=["generate", str(tiny_runs / "autoencoder")])
    shutil.copytree(tiny_runs / "lm", tmp_path / "lm")
    shutil.rmtree(tmp_path / "lm" / "checkpoints")
    fails(2, str(tmp_path / "lm"), "checkpoint", words=["generate", str(tmp_path / "lm")])


def test_prompts_that_do_not_fit_are_refused(tiny_runs, tmp_path):
    words = ["generate", str(tiny_runs / "lm"), "--max-tokens", "8"]
    fails(2, "context", words=[*words, "--prompt", "x" * 999])
    fails(2, "temperature", words=[*words, "--temperature", "0"])
    fails(2, "nowhere.txt", words=[*words, "--prompt-file", str(tmp_path / "nowhere.txt")])


@pytest.mark.parametrize("verb", ["train lm", "evaluate", "generate", "export", "quickstart", "data prepare", "doctor"])
def test_every_verb_explains_itself(verb, capsys):
    from calm.cli import main

    assert main([*verb.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out
