"""The token baseline and fine-tuning from the command line: what a model begins with, and what it may not begin with."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import calm
import tiny
from calm.core.transformer import TransformerConfig
from calm.runs.init_from import StartingPoint
from calm.runs.stages import load_run_config, starting_point
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenLossConfig, TokenObjective
from loss_terms import loss as loss_of

TOKEN_LM = [*tiny.BACKBONE, *tiny.HEADS, *tiny.TRAIN]
STEP = "--train.steps 1 --train.batch-size 2 --train.num-tokens 64 --train.precision float32".split()


@pytest.fixture(scope="module")
def folder(tiny_runs, tmp_path_factory) -> Path:
    """token-lm/ and its export/, and pairs/, data of prompts and responses."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny.run("train", "token-lm", "--data", str(tiny_runs / "data"), "--out", str(folder / "token-lm"), *TOKEN_LM)
    tiny.run("export", str(folder / "token-lm"), "--out", str(folder / "export"))
    records = [{"prompt": f"What is {number}?", "response": f" It is {number}, of course."} for number in range(300)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = ["--field", "response", "--prompt-field", "prompt", "--tokenizer", "bytes"]
    tiny.run("data", "prepare", "--source", str(folder / "pairs.jsonl"), "--out", str(folder / "pairs"), *words)
    return folder


def begin(folder: Path, out: Path, start: Path, *words: str, kind: str = "token-lm") -> list[str]:
    runs = ["--data", str(folder / "pairs"), "--out", str(out), "--init-from", str(start)]
    return ["train", kind, *runs, *STEP, *words]


def fails(*parts: str, words: list[str]) -> None:
    code, result, err = tiny.calm(*words)
    line = err.splitlines()[-1]
    assert code == 2 and result["exit_code"] == 2 and all(part in line for part in parts), line


def weights(lm) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(lm))]


def test_a_token_run_goes_through_every_command(folder, tiny_runs):
    run = str(folder / "token-lm")
    kept = load_run_config(run)
    assert kept.kind == "token_lm" and kept.model.vocab_size == 259
    scores = tiny.run("evaluate", run, "--max-tokens", "400")
    assert "autoencoder" not in scores
    for name in ("lm", "bigram", "unigram"):
        report = scores[name]
        bits = report["nats_per_token"]["estimate"] / np.log(2)  # one byte a token, but for the end tokens
        assert report["bits_per_byte"]["estimate"] == pytest.approx(bits, rel=0.02)
        assert report["perplexity"]["estimate"] == pytest.approx(np.exp(report["nats_per_token"]["estimate"]))
    words = ["--prompt", "The cat", "--max-tokens", "8", "--temperature", "0.7", "--top-k", "20", "--top-p", "0.9"]
    texts = [tiny.run("generate", str(where), *words)["texts"] for where in (run, folder / "export")]
    assert texts[0] == texts[1]
    model = calm.load(run)
    pieces = []
    assert model.generate("The cat", max_tokens=8, stream=pieces.append)["texts"][0].startswith("".join(pieces))


def test_a_model_is_judged_by_another(folder, tiny_runs):
    words = ["--max-tokens", "400", "--split", "train", "--samples", "4", "--sample-tokens", "20"]
    scores = tiny.run("evaluate", str(tiny_runs / "lm"), *words, "--judge", str(folder / "token-lm"))["writing"]
    assert [each["name"] for each in scores["writings"]] == [
        "decoder without a vector",  # what a model of four steps is
        "unigram",
        "bigram",
        "held-out text",
    ]
    assert all(each["bits_per_byte"]["estimate"] > 0 for each in scores["writings"])
    fails(
        "only a token model can judge", words=["evaluate", str(folder / "token-lm"), *words, "--judge", str(tiny_runs / "lm")]
    )
    fails("is the model that is judged", words=["evaluate", str(folder / "export"), *words, "--judge", str(folder / "export")])
    fails("--samples", words=["evaluate", str(tiny_runs / "lm"), "--judge", str(folder / "token-lm")])


def test_a_run_begins_with_the_weights_of_another(folder, tmp_path):
    """One step at a learning rate of almost nothing leaves them as they were."""
    still = ["--train.optimizer.learning-rate", "1e-12", "--train.optimizer.weight-decay", "0"]
    before = weights(calm.load(folder / "token-lm").lm)
    for number, start in enumerate((folder / "token-lm", folder / "export")):
        out = tmp_path / str(number)
        scores = tiny.run(*begin(folder, out, start, *still))
        assert {"valid/objective", "valid/nats_per_token"} <= set(scores)
        for mine, theirs in zip(weights(calm.load(out).lm), before, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
        assert json.loads((out / "meta.json").read_text())["init_from"] == str(start)


@pytest.mark.slow
def test_a_latent_model_brings_its_autoencoder_along(folder, tiny_runs, tmp_path):
    words = begin(
        folder, tmp_path / "lm", tiny_runs / "lm", "--loss.num-samples", "2", "--loss.terms.auxiliary.weight", "1", kind="lm"
    )
    tiny.run(*words)
    tuned, before = calm.load(tmp_path / "lm"), calm.load(tiny_runs / "lm")
    for mine, theirs in zip(weights(tuned.autoencoder), weights(before.autoencoder), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert tuned.lm.config == before.lm.config
    tiny.run(*words)  # the same command goes on, or here: is done
    fails("brings its own autoencoder", words=[*words, "--autoencoder", str(tiny_runs / "autoencoder")])


def test_what_does_not_fit_is_one_line_and_nothing_is_written(folder, tiny_runs, tmp_path):
    out, token = tmp_path / "out", folder / "token-lm"
    fails("no such folder", words=begin(folder, out, tmp_path / "nowhere"))
    fails(
        "another shape",
        "model.backbone.dim is 16 there and 32 here",
        words=begin(folder, out, token, "--model.backbone.dim", "32"),
    )
    fails("a latent language model, and a token model", words=begin(folder, out, tiny_runs / "lm"))
    fails("a token model, and a latent", words=begin(folder, out, token, kind="lm"))
    fails("holds an autoencoder", words=begin(folder, out, tiny_runs / "autoencoder"))
    other = str(tmp_path / "bpe")
    tiny.run("data", "prepare", "--source", str(tiny_runs / "text"), "--out", other, "--tokenizer", "bpe:300")
    fails("made with another tokenizer", str(token / "tokenizer.json"), words=[*begin(folder, out, token), "--data", other])

    cut = tmp_path / "cut"
    shutil.copytree(folder / "export", cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails("model.safetensors", "cut short", words=begin(folder, out, cut))

    broken = tmp_path / "broken"
    shutil.copytree(token, broken)
    for file in (broken / "checkpoints").rglob("d/*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:40])
    fails("init-from", "damaged or cut short", words=begin(folder, out, broken))
    assert not out.exists()


def test_a_starting_point_fills_what_it_lacks_with_fresh_weights(tiny_runs):
    from calm.core.autoencoder import Autoencoder
    from calm.core.objective import LatentObjective

    start = starting_point(tiny_runs / "lm")
    assert isinstance(start.autoencoder, Autoencoder)
    loss = loss_of(num_samples=2, auxiliary_weight=1.0)
    objective = LatentObjective(start.config, loss, start.autoencoder, context=48)
    initial = start.initial(objective, seed=0)
    assert set(initial) == {"lm", "auxiliary"}
    for mine, theirs in zip(jax.tree.leaves(initial["lm"]), jax.tree.leaves(start.params["lm"]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_token_model_begins_with_or_without_the_flow_that_another_trained_beside_it():
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=24)
    config = TokenLMConfig(vocab_size=24, backbone=backbone)
    bare, flow = (TokenObjective(config, TokenLossConfig(flow_weight=weight), context=16) for weight in (0.0, 1.0))
    other = jax.jit(flow.init)(jax.random.key(5))
    for params in (other, other["lm"]):  # of a run with a flow, and of one without or an export
        start = StartingPoint("there", config, params, None, None)
        begun = start.initial(flow, seed=0)
        assert set(begun) == {"lm", "flow"}
        for found in (begun["lm"], start.initial(bare, seed=0)):
            for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(other["lm"]), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        own = start.initial(flow, seed=0)["flow"]
        same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(other["flow"]), strict=True))
        assert same == isinstance(params, dict)
