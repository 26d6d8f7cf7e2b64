"""`calm dual`: two runs on one text, from the command line, and its errors for runs that do not belong together."""

import json

import pytest

import tiny


@pytest.fixture(scope="module")
def pair(tiny_runs, tmp_path_factory) -> list[str]:
    """Run folders of a token model and of a latent model on the same data."""
    token = tmp_path_factory.mktemp("dual") / "token"
    words = [*tiny.BACKBONE, *tiny.HEADS, *tiny.TRAIN]
    tiny.run("train", "token-lm", "--data", str(tiny_runs / "data"), "--out", str(token), *words)
    return [str(token), str(tiny_runs / "lm")]


def test_matched_drafts_write_what_the_token_model_writes(pair):
    words = ["--prompt", "The cat", "--max-tokens", "8", "--seed", "3"]
    drafted = tiny.run("dual", "generate", *pair, "--rule", "match", *words)
    assert drafted["texts"] == tiny.run("generate", pair[0], *words)["texts"]
    work = drafted["work"]
    assert work["tokens"] == work["accepted"] + work["passes"] and work["passes"] <= 8


def test_drafting_is_measured_beside_the_token_model_alone(pair, tmp_path, capsys):
    words = ["--latents", "2", "--boundaries", "kept", "--prompts", "2", "--prompt-tokens", "16", "--max-tokens", "16"]
    found = tiny.run("dual", "measure", *pair, *words, "--precision", "float32", "--out", str(tmp_path))
    assert [(row["rule"], row["num_latents"]) for row in found["rows"]] == [("accept", 2), ("match", 2)]
    accept, match = found["rows"]
    assert match["same_texts"] == 2 and 1 <= accept["tokens_per_pass"] <= 5
    for row in found["rows"]:
        cost = row["flops_per_token"]
        assert cost["total"] == pytest.approx(cost["target"] + cost["proposer"] + cost["drafts"])
        assert row["speedup"] > 0 and row["alone_flops_per_token"] > 0
    assert json.loads((tmp_path / "drafting.json").read_text()) == found
    text = (tmp_path / "drafting.md").read_text()
    assert "2 prompts of 16 tokens, 16 written" in text and len(text.splitlines()) == 6


def test_a_router_is_fitted_scored_saved_and_writes(pair, tmp_path):
    words = ["--steps", "20", "--train-tokens", "1k", "--max-tokens", "1k", "--num-samples", "2", "--shares", "0", "0.5", "1"]
    found = tiny.run("dual", "route", *pair, *words, "--precision", "float32", "--out", str(tmp_path))["routing"]
    assert [point["asked"] for point in found["points"]] == [0, 0.5, 1] and found["protocol"]["split"] == "valid"
    ends = found["points"][0], found["points"][-1]
    assert [point["share"] for point in ends] == [0, 1] and [point["steps"] for point in ends] == [0.25, 1.25]
    assert json.loads((tmp_path / "routing.json").read_text()) == found
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    write = ["dual", "generate", *pair, "--prompt", "The", "--max-tokens", "8", "--router", str(tmp_path)]
    for share, chunks in (("0", [0]), ("1", [2])):
        assert tiny.run(*write, "--share", share)["work"] == {"chunks": [2], "by_tokens": chunks}
    code, result, _ = tiny.calm(*write, "--share", "1.5")
    assert code == 2 and "between 0 and 1, got 1.5" in result["error"]
    code, result, _ = tiny.calm(*write, "--share", "0.5", "--latents", "4")
    assert code == 2 and "writes without drafts" in result["error"]
    told = json.loads((tmp_path / "router.json").read_text())
    for change, message in (
        ({"chunk_size": 2}, "K = 2 tokens, this model's have 4"),
        ({"tokenizer": "x"}, "another tokenizer"),
    ):
        (tmp_path / "router.json").write_text(json.dumps(told | change))
        code, result, _ = tiny.calm(*write, "--share", "0.5")
        assert code == 2 and message in result["error"]


def test_the_costs_of_routing_count_what_both_models_read(pair):
    """CALM and router at every chunk, the token model at every token; a chunk by CALM saves the token model's logits alone."""
    from calm.dual.pair import load_pair, routing_costs
    from calm.dual.router import RouterConfig
    from calm.evaluate.flops import next_vector_inference

    both = load_pair(*pair)
    token_lm, predictor = both.models
    router, lm, size = RouterConfig(dim=16), predictor.lm.config, predictor.chunk_size
    parts = next_vector_inference(lm, predictor.autoencoder.config, 64 // size)
    position, logits = token_lm.config.flops(64), 2 * token_lm.config.width * token_lm.config.vocab_size
    by_chunk, by_token = routing_costs(both, router, 64)
    assert by_token == pytest.approx(parts.backbone + router.flops() / size + position)
    assert by_chunk - by_token == pytest.approx(parts.head + parts.writing - logits)


@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        ((1, 0), "", "the model that checks must be a token model"),
        ((0, 0), "", "the model that drafts must be a next-vector model"),
        ((0, 1), "--temperature 0", "must be above 0"),
        ((0, 1), "--latents 0", "num_latents must be at least 1"),
        ((0, 1), "--max-tokens 100k", "is too many"),
        ((0, 1), "--share 0.5", "--router and --share go together"),
        ((0, 1), "--share 0.5 --router nowhere", "no such file; calm dual route"),
        ((0, 1), "--rule hope", "rule"),
    ],
)
def test_what_does_not_go_together_is_one_line(pair, order, options, message):
    code, result, _ = tiny.calm("dual", "generate", *(pair[each] for each in order), *options.split())
    assert code == 2 and message in result["error"]


def test_two_tokenizers_are_refused(pair, tiny_runs, tmp_path):
    """Of the same size, so that nothing else tells them apart."""
    import shutil

    from calm.dual.pair import load_pair
    from calm.errors import UsageError

    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    swap = tokenizer["model"]["vocab"] if "model" in tokenizer else tokenizer
    first, second, *_ = [name for name in swap if isinstance(swap[name], int)]
    swap[first], swap[second] = swap[second], swap[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="trained with two tokenizers"):
        load_pair(other, pair[1])


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("measure", "--prompts 0", "at least one recipe, one prompt"),
        ("measure", "--prompt-tokens 10k", "do not fit in the 192"),
        ("route", "--split train", "score it on valid or test"),
        ("route", "--steps 0", "must be at least 1"),
    ],
)
def test_measures_that_cannot_be_taken_are_one_line(pair, verb, options, message):
    code, result, _ = tiny.calm("dual", verb, *pair, *options.split())
    assert code == 2 and message in result["error"]
