"""A trained model as one object: text in, text out; and runs of the real stages that go on to the bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import calm
import tiny
from calm.core.objective import LatentObjective
from calm.errors import UsageError
from calm.evaluate.closed_form import score_ngram
from calm.evaluate.ngram import fit_ngrams
from calm.heads.terms import AuxiliaryTerm
from calm.runs.stages import load_run_config, train_lm, validation_blocks
from calm.text.shards import open_data
from calm.train.checkpoint import load_parameters


@pytest.fixture(scope="module")
def model(tiny_runs):
    return calm.load(tiny_runs / "lm")


def test_latents_come_one_a_chunk_and_decode_to_text(model):
    text = "The cat sees the dog."
    latents = model.encode(text)
    tokens = len(model.tokenizer.encode(text))
    assert tokens % 4 and latents.shape == (tokens // 4 + 1, 8)  # the first chunk holds T mod K tokens behind begin ids
    assert isinstance(model.decode(latents), str)
    np.testing.assert_array_equal(latents[1:], model.encode(text[-(tokens // 4) * 4 :]))  # chunks end where the text ends


def test_latents_of_another_width_are_refused(model):
    with pytest.raises(UsageError, match=r"latents must be \[N 8\], got \[3, 5\]"):
        model.decode(np.zeros((3, 5), np.float32))


def test_the_same_seed_writes_the_same_text_and_streams_it(model):
    first, again = (model.generate("The cat", max_tokens=10, seed=3) for _ in range(2))
    pieces = []
    streamed = model.generate("The cat", max_tokens=10, seed=3, stream=pieces.append)
    assert first == again and streamed["tokens"] == first["tokens"] and streamed["texts"] == first["texts"]
    assert first["texts"][0].startswith("".join(pieces))
    assert model.generate("The cat", max_tokens=10, seed=4) != first


def test_below_one_the_sampler_reports_its_draws(model):
    result = model.generate(["The cat", ""], max_tokens=8, temperature="1/3", candidates=6)
    assert result["draws"] == [12, 12] and all(0 <= share <= 1 for share in result["fallback_share"])


def test_an_autoencoder_alone_encodes_but_does_not_write(tiny_runs):
    model = calm.load(tiny_runs / "autoencoder")
    assert model.lm is None and model.encode("river").shape[1] == 8
    with pytest.raises(UsageError, match="holds an autoencoder only"):
        model.generate("The")


def test_scores_carry_their_protocol(model):
    scores = model.evaluate(max_tokens=400)
    report = scores["lm"].to_dict()
    assert report["protocol"]["chunk_size"] == 4 and report["protocol"]["tokenizer"] == model.tokenizer.fingerprint
    assert json.dumps(report)


def test_baselines_are_fitted_on_what_the_model_was_trained_on(model, tiny_runs, tmp_path):
    tokenizer = str(tiny_runs / "data" / "tokenizer.json")
    tiny.write_corpus(tmp_path / "text", seed=5)
    tiny.run("data", "prepare", "--source", str(tmp_path / "text"), "--out", str(tmp_path / "data"), "--tokenizer", tokenizer)
    there = model.evaluate(tmp_path / "data", split="train", max_tokens=400)
    foreign = dataclasses.replace(model, data="").evaluate(tmp_path / "data", split="train", max_tokens=400)
    assert there["lm"].brier_n == foreign["lm"].brier_n
    fitted = {
        folder: fit_ngrams(open_data(folder / "data").split("train"), model.tokenizer.vocab_size)[1]
        for folder in (tiny_runs, tmp_path)
    }
    blocks, documents = validation_blocks(open_data(tmp_path / "data"), model.block_tokens, "train", 400)
    for scores, folder in ((there, tiny_runs), (foreign, tmp_path)):
        expected = score_ngram(fitted[folder], blocks, documents, chunk_size=4).scalars()
        assert scores["bigram"].scalars() == expected
    assert there["bigram"].scalars() != foreign["bigram"].scalars()
    with pytest.raises(UsageError, match="does not know what it was trained on"):
        dataclasses.replace(model, data="").evaluate()


def test_an_export_keeps_what_it_takes_to_score_it(model, tiny_runs, tmp_path):
    model.export(tmp_path / "export")
    again = calm.load(tmp_path / "export")
    assert again.block_tokens == model.block_tokens == 192
    first, second = (m.evaluate(tiny_runs / "data", max_tokens=400)["lm"].brier_n for m in (model, again))
    assert first == second


def test_a_stage_goes_on_to_the_bit(tiny_runs, tmp_path):
    run = load_run_config(tiny_runs / "lm")
    loss = run.loss.with_terms(AuxiliaryTerm(weight=1.0))
    run = dataclasses.replace(run, loss=loss, train=dataclasses.replace(run.train, save_every=2, keep_checkpoints=9))
    train_lm(run, tmp_path / "whole", quiet=True)
    train_lm(run, tmp_path / "part", resume=f"{tmp_path / 'whole'}@2", quiet=True)
    autoencoder = calm.load(tiny_runs / "lm").autoencoder
    objective = LatentObjective(run.model, run.loss, autoencoder, context=48)
    target = jax.eval_shape(objective.init, jax.random.key(0))
    whole, part = (load_parameters(tmp_path / name / "checkpoints", 4, target) for name in ("whole", "part"))
    jax.tree.map(np.testing.assert_array_equal, whole, part)
    earlier = load_parameters(tmp_path / "whole" / "checkpoints", 2, target)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(earlier), jax.tree.leaves(whole), strict=True))


def test_a_run_keeps_the_autoencoder_that_it_began_with(tiny_runs, tmp_path):
    run = load_run_config(tiny_runs / "lm")
    train_lm(run, tmp_path / "lm", quiet=True)
    weights = tmp_path / "lm" / "autoencoder" / "model.safetensors"
    before = weights.read_bytes()
    train_lm(run, tmp_path / "lm", quiet=True)
    assert weights.read_bytes() == before
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=9))
    with pytest.raises(UsageError, match=r"train\.seed"):
        train_lm(other, tmp_path / "lm", quiet=True)
    assert weights.read_bytes() == before


def test_a_preset_trains_both_stages_of_the_published_sizes_without_allocating():
    from calm.runs import presets

    llama = 128_257
    for name, millions in (("calm-m", 371), ("calm-l", 735), ("calm-xl", 1820)):
        lm = dataclasses.replace(presets.get(name).lm.model, vocab_size=llama, chunk_size=4, latent_dim=128)
        assert abs(lm.parameters() / 1e6 / millions - 1) < 0.03
