"""Settings of generation: as keywords or as one object; and a continuation's text in the context of its prompt."""

import pytest

import calm
from calm.runs.bundle import GenerationConfig


@pytest.fixture(scope="module")
def model(tiny_runs):
    return calm.load(tiny_runs / "lm")


def test_keywords_and_an_object_are_the_same(model):
    config = GenerationConfig(max_tokens=12, temperature=0.5, candidates=8, seed=3)
    expected = model.generate("The cat", max_tokens=12, temperature=0.5, candidates=8, seed=3)
    assert model.generate("The cat", config) == expected
    assert model.generate("The cat", config, seed=3, max_tokens=12) == expected
    assert model.generate("The cat", config, seed=4) != expected


def test_an_unknown_setting_is_an_error(model):
    with pytest.raises(TypeError, match="temperatur"):
        model.generate("The cat", temperatur=0.5)


def test_streamed_pieces_are_the_text(model):
    pieces = []
    text = model.generate("The cat", max_tokens=24, seed=1, stream=pieces.append)["texts"][0]
    assert "".join(pieces) == text and len(pieces) > 1


def test_words_are_not_glued_to_the_prompt(tiny_runs, tmp_path):
    import tiny

    def short(options: list[str]) -> list[str]:
        return ["32" if word == "192" else word for word in options]

    data, codec, lm = (str(tmp_path / name) for name in ("data", "autoencoder", "lm"))
    tiny.run("data", "prepare", "--source", str(tiny_runs / "text"), "--out", data, "--tokenizer", "words:60")
    tiny.run("train", "autoencoder", "--data", data, "--out", codec, *short(tiny.AUTOENCODER))
    tiny.run("train", "lm", "--data", data, "--autoencoder", codec, "--out", lm, *short(tiny.LM))
    model = calm.load(lm)
    found = model.generate("The river", max_tokens=8, seed=0)
    whole = "The river" + found["texts"][0]
    assert found["tokens"] == [8] and found["texts"][0][0].isspace() and len(model.tokenizer.encode(whole)) == 10, whole
