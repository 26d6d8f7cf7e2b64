"""The commands that look closer: a likelihood bound, latents, the first failing stage, and what a run cost."""

import json

import pytest

import tiny


def test_a_bound_stands_beside_the_scores_and_the_cost(tiny_runs):
    words = ["evaluate", str(tiny_runs / "lm"), "--max-tokens", "2k", "--num-samples", "2"]
    scores = tiny.run(*words, "--bound", "4", "--bound-tokens", "800")
    bounds = [value["nats_per_token"] for value in scores["bound"]["bounds"].values()]
    assert len(bounds) == 3 and bounds == sorted(bounds, reverse=True)
    assert 0 < scores["bound"]["protocol"]["smoothing_share"] < 1 and scores["bound"]["protocol"]["samples"] == 4
    assert "not scored" in scores["bound"]["smoothing_fitted_on"]
    on_test = tiny.run(*words, "--split", "test", "--bound", "1", "--bound-tokens", "400")
    assert on_test["bound"]["smoothing_fitted_on"].endswith("blocks of valid")
    cost = scores["flops"]
    assert cost["inference"]["total"] > 0 and cost["training"]["before"] > 0
    assert cost["training"]["total"] > cost["training"]["before"]
    assert scores["flops"]["training"]["tokens"] == 4 * 2 * 192


def test_a_run_says_what_it_cost(tiny_runs):
    stage_1, stage_2 = (json.loads((tiny_runs / name / "meta.json").read_text())["flops"] for name in ("autoencoder", "lm"))
    assert stage_1["before"] == 0 and stage_2["before"] == stage_1["per_token"] * stage_1["tokens"]
    timing = [json.loads(line) for line in (tiny_runs / "lm" / "timing.jsonl").read_text().splitlines()]
    assert timing[-1]["training_flops"] == stage_2["per_token"] * 2 * 192 * (timing[-1]["step"] + 1)


def test_latents_are_inspected(tiny_runs, tmp_path):
    found = tiny.run("inspect", "autoencoder", str(tiny_runs / "lm"), "--max-tokens", "400", "--out", str(tmp_path))
    assert len(found["autoencoder"]["kl"]) == 8 and len(found["autoencoder"]["curves"]) == 3
    assert (tmp_path / "autoencoder.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "autoencoder.json").read_text()) == found["autoencoder"]


def test_evaluate_judges_the_use_of_the_vector(tiny_runs):
    words = ["evaluate", str(tiny_runs / "lm"), "--max-tokens", "800", "--num-samples", "2"]
    scores = tiny.run(*words, "--vector-tokens", "400")
    vector = scores["vector"]
    assert vector["scored_tokens"] == 2 * (192 - 4) and set(vector["latents"]) == {"own", "foreign", "previous", "zero", "true"}
    cost = vector["latents"]["foreign"]["nats_per_token"]["estimate"] - vector["latents"]["own"]["nats_per_token"]["estimate"]
    assert vector["cost"]["estimate"] == pytest.approx(cost, abs=1e-6) and vector["protocol"]["samples"] == 2
    assert vector["foreign_from_the_same_document"] == 0  # two blocks, far apart
    assert scores["lm"]["name"] == (vector["label"] or "CALM") == scores["against_bigram"]["first"]
    without = tiny.run(*words, "--vector-tokens", "0")
    assert "vector" not in without and without["lm"]["name"] == "CALM"
    assert without["lm"]["brier_lm"] == scores["lm"]["brier_lm"]


def test_a_frontier_is_decoded_as_suits_the_model(tiny_runs, monkeypatch):
    from calm.core.predictor import NextVector

    words = ["frontier", str(tiny_runs / "lm"), "--max-tokens", "200", "--positions", "2", "--candidates", "4"]
    words += ["--temperatures", "1/2"]
    assert tiny.run(*words)["frontier"]["protocol"]["decoding"] == "argmax"
    monkeypatch.setattr(NextVector, "decoding", "drawn")
    assert tiny.run(*words)["frontier"]["protocol"]["decoding"] == "drawn"
    assert tiny.run(*words, "--decoding", "argmax")["frontier"]["protocol"]["decoding"] == "argmax"


def test_export_takes_the_best_checkpoint_and_says_so(tiny_runs, tmp_path, capsys):
    import numpy as np

    from calm.cli import main
    from calm.runs import bundle

    assert main(["export", "--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert "best checkpoint" in help_text and "newest" not in help_text
    tiny.run("export", str(tiny_runs / "lm"), "--out", str(tmp_path / "export"))
    exported, run = bundle.load(tmp_path / "export"), bundle.load(tiny_runs / "lm")
    np.testing.assert_array_equal(exported.encode("The cat sees."), run.encode("The cat sees."))


def test_diagnose_names_the_codec_of_a_model_that_was_hardly_trained(tiny_runs, tmp_path):
    out = tmp_path / "found.json"
    found = tiny.run("diagnose", str(tiny_runs / "lm"), "--max-tokens", "800", "--candidates", "4", "--out", str(out))
    assert found["first_failure"] == "codec round trip" and len(found["stages"]) == 7
    assert found["stages"][2]["name"] == "vector use" and found["vector"]["verdict"] in ("used", "weak", "unused")
    assert json.loads(out.read_text()) == found and "first stage that fails is codec round trip" in found["verdict"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["diagnose", "autoencoder"], "autoencoder only"),
        (["evaluate", "autoencoder", "--bound", "4"], "autoencoder only"),
        (["evaluate", "lm", "--bound", "-1"], "at least 1 sample"),
        (["diagnose", "lm", "--num-samples", "1"], "num_samples"),
        (["evaluate", "lm", "--vector-tokens", "-1"], "vector_tokens"),
        (["diagnose", "lm", "--vector-tokens", "-1"], "vector_tokens"),
        (["inspect", "autoencoder", "nowhere"], "nowhere"),
    ],
)
def test_what_a_run_cannot_give_is_one_line(tiny_runs, words, part):
    place = -1 if words[0] == "inspect" else 1
    words = [str(tiny_runs / word) if word is words[place] else word for word in words]
    code, result, err = tiny.calm(*words)
    assert code == 2 and part in result["error"] and "internal error" not in err
