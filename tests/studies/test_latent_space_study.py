"""The study of latent spaces: one autoencoder for each cell and seed, its scores, and the language model on it."""

import dataclasses

import pytest

import tiny
from calm import config
from calm.runs.stages import AutoencoderRun, LatentLMRun, load_run_config
from calm.studies import latent_spaces
from calm.studies.latent_spaces import SPACES, LatentSpaceStudy, autoencoders, by_level, language_models
from calm.studies.scoring import LanguageModelScore
from calm.studies.study import Place, Request

RECIPE = LatentSpaceStudy().recipe


def test_cells_differ_in_their_autoencoder_and_in_nothing_else(tmp_path):
    place = Place("data", tmp_path)
    first, *others = autoencoders(place, 8e13)
    for cell in (first, *others):
        assert cell.budget == 4e13 and isinstance(cell.run, AutoencoderRun) and cell.run.train == first.run.train
        (tmp_path / "config.toml").write_text(config.to_toml(cell.run))
        assert config.load(AutoencoderRun, [tmp_path / "config.toml"]) == cell.run
    models = {cell.name.removeprefix("autoencoder-"): cell.run.model for cell in (first, *others)}
    assert list(models) == list(SPACES)
    assert dataclasses.replace(models["spherical-k4"], posterior="gaussian") == models["gaussian-k4"]
    assert dataclasses.replace(models["hierarchical-k16"].lower, chunk_size=16, latent_dim=256) == models["gaussian-k16"]
    assert [others[-1].run.model.lower_weight, others[-2].run.model.lower_weight] == [0.0, 1.0]
    for seed in (0, 3):
        cells = language_models(place, 8e13, seed, RECIPE)
        assert [cell.run.autoencoder for cell in cells] == [
            str(tmp_path / f"autoencoder-{name}/seed-{seed}") for name in SPACES
        ]
        assert len({config.to_toml(dataclasses.replace(cell.run, autoencoder="")) for cell in cells}) == 1
        assert all(cell.budget == 8e13 and cell.run.loss.weight("auxiliary") == 1 for cell in cells)


def test_a_lower_level_has_a_row_of_its_own():
    rows = by_level(
        [{"cell": "autoencoder-a", "seed": 0, "x": 1, "lower": {"x": 2}}, {"cell": "autoencoder-b", "seed": 0, "x": 3}]
    )
    assert [(row["cell"], row["x"]) for row in rows] == [("a", 1), ("a, lower level", 2), ("b", 3)]


def test_options_without_a_use_are_refused(tmp_path):
    words = ["experiment", "latent-spaces", "--out", str(tmp_path)]
    code, answer, _ = tiny.calm(*words)
    assert code == 2 and "latent-spaces: needs --data" in answer["error"]
    for option in (("--model", "run"), ("--concept", "sea,ship")):
        code, answer, _ = tiny.calm(*words, "--data", "d", *option)
        assert code == 2 and f"latent-spaces: has no use for {option[0]}; leave it out" in answer["error"]
    code, answer, _ = tiny.calm(*words, "--data", "d", "--only", "cubic-k4")
    assert code == 2 and "there is no cell 'cubic-k4'; there are: gaussian-k4, spherical-k4" in answer["error"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sphere_and_levels_from_end_to_end(tiny_runs, tmp_path, monkeypatch):
    """Both stages of two cells at the smallest size; once done they are read back."""
    stage_1 = load_run_config(tiny_runs / "autoencoder")
    stage_2 = load_run_config(tiny_runs / "lm")
    assert isinstance(stage_1, AutoencoderRun) and isinstance(stage_2, LatentLMRun)

    def small(place, name):
        changes, loss = SPACES[name]
        sizes = dict(dim=16, inner_dim=16, latent_dim=8, lower_latent_dim=4)
        model = dataclasses.replace(stage_1.model, **changes | sizes)
        return dataclasses.replace(stage_1, model=model, loss=dataclasses.replace(stage_1.loss, **loss))

    def recipe(place):
        model = dataclasses.replace(stage_2.model, vocab_size=0, chunk_size=0, latent_dim=0)
        return dataclasses.replace(stage_2, model=model, train=dataclasses.replace(stage_2.train, best_metric=""))

    monkeypatch.setattr(latent_spaces, "autoencoder_run", small)
    score = LanguageModelScore(precision="float32", split="valid", max_tokens=768, bound_samples=2)
    options = dict(name="latent-spaces", data=str(stage_1.data), score=score, log=lambda _: None)
    request = Request(out=tmp_path, only=("spherical-k4", "hierarchical-k16"), **options)
    found = LatentSpaceStudy(recipe=recipe).run(request)
    assert [(result["cell"], result["seed"]) for result in found["results"]] == [
        ("autoencoder-spherical-k4", 0),
        ("autoencoder-hierarchical-k16", 0),
        ("spherical-k4", 0),
        ("hierarchical-k16", 0),
    ]
    sphere, levels, *models = found["results"]
    assert "lower" not in sphere and {"tokens 0.3", "chunks 0"} < set(levels["lower"]["shares"])
    assert all("brier_lm" in model and model["nats_per_token_at_most"] > 0 for model in models)
    for words in ("hierarchical-k16, lower level", "BrierLM", "KL, nats/token", "hierarchical-k16 - spherical-k4"):
        assert words in found["summary"]
    assert (tmp_path / "latent-spaces.md").read_text() == found["summary"] + "\n"
    assert LatentSpaceStudy(recipe=recipe).run(request) == found
