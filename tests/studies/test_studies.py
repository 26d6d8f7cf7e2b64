"""Studies: a budget pays for everything, a cell runs once whatever stops it, and outside studies register themselves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from calm.core.objective import EnergyTerm
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.heads.terms import AuxiliaryTerm
from calm.runs.stages import LatentLMRun, TokenLMRun, load_run_config
from calm.studies import catalogue, runner
from calm.studies.catalogue import Listing
from calm.studies.runner import Cell, autoencoder_flops, flops_per_token, grid, locked, parse_axes, run_cells, sized
from calm.studies.scoring import WRITING_COLUMNS, over_seeds, results_table
from calm.studies.study import LanguageModelStudy, Place, Request, _held_out
from calm.token.model import TokenLMConfig


def latent_run(tiny_runs: Path) -> LatentLMRun:
    run = load_run_config(tiny_runs / "lm")
    assert isinstance(run, LatentLMRun)
    return run


def token_run(tiny_runs: Path) -> TokenLMRun:
    latent = latent_run(tiny_runs)
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)
    train = dataclasses.replace(latent.train, best_metric="")
    return TokenLMRun(data=latent.data, model=TokenLMConfig(backbone=backbone), train=train)


def test_a_budget_pays_for_the_autoencoder_too(tiny_runs):
    run = latent_run(tiny_runs)
    before, step = autoencoder_flops(run), flops_per_token(run) * run.train.batch_size * run.train.num_tokens
    stage_1 = load_run_config(tiny_runs / "autoencoder")
    assert before == flops_per_token(stage_1) * 4 * 2 * 192  # steps, rows, tokens in a row
    assert sized(run, before + 7.5 * step).train.steps == 7
    assert autoencoder_flops(token_run(tiny_runs)) == 0
    writers = [ContextDecoderConfig(use_latent=use_latent) for use_latent in (True, False)]
    written = [dataclasses.replace(run, model=dataclasses.replace(run.model, context_decoder=writer)) for writer in writers]
    assert [autoencoder_flops(each) for each in written] == [before, 0]  # nothing of the second is a latent
    with pytest.raises(UsageError, match="is too little: the autoencoder took"):
        sized(run, before + 0.5 * step)


def test_terms_that_come_and_go_do_so_at_the_same_part_of_a_shorter_run(tiny_runs):
    run = latent_run(tiny_runs)
    loss = run.loss.with_terms(AuxiliaryTerm(decay_steps=100), EnergyTerm(from_step=50))
    train = dataclasses.replace(run.train, steps=100)
    run = dataclasses.replace(run, loss=loss, train=train)
    step = flops_per_token(run) * train.batch_size * train.num_tokens
    given = sized(run, autoencoder_flops(run) + 8.5 * step)
    assert (given.train.steps, given.loss.terms["auxiliary"].decay_steps, given.loss.terms["energy"].from_step) == (8, 8, 4)
    assert sized(latent_run(tiny_runs), 3e10).loss == latent_run(tiny_runs).loss


def test_two_kinds_of_model_get_equal_compute(tiny_runs):
    budget = 3e10
    for run in (latent_run(tiny_runs), token_run(tiny_runs)):
        given = sized(run, budget)
        spent = runner.describe("x", 0, given)["training_flops"]
        step = flops_per_token(run) * run.train.batch_size * run.train.num_tokens
        assert budget - step < spent <= budget


def test_a_study_runs_each_cell_once_and_goes_on_after_a_failure(tiny_runs, tmp_path):
    cells = [Cell(name="token", run=token_run(tiny_runs)), Cell(name="calm", run=latent_run(tiny_runs))]
    scored = []

    def score(folder: Path) -> dict:
        scored.append(folder.parent.name)
        if folder.parent.name == "calm" and len(scored) == 2:
            raise RuntimeError("stopped while scoring")
        return {"brier_lm": 1.0}

    with pytest.raises(RuntimeError):
        run_cells(cells, tmp_path, seeds=(0,), score=score, log=lambda _: None)
    checkpoints = sorted((tmp_path / "calm" / "seed-0" / "checkpoints").iterdir())
    results = run_cells(cells, tmp_path, seeds=(0,), score=score, log=lambda _: None)
    assert scored == ["token", "calm", "calm"]
    assert sorted((tmp_path / "calm" / "seed-0" / "checkpoints").iterdir()) == checkpoints
    assert [(result["cell"], result["seed"], result["steps"]) for result in results] == [("token", 0, 4), ("calm", 0, 4)]
    longer = [Cell(name="token", run=token_run(tiny_runs), budget=1e12)]
    with pytest.raises(UsageError, match="was run with other settings of train"):
        run_cells(longer, tmp_path, seeds=(0,), score=score, log=lambda _: None)


def test_a_cell_that_somebody_else_is_at_is_left_to_them(tiny_runs, tmp_path):
    folder = tmp_path / "token" / "seed-0"
    cells, said = [Cell(name="token", run=token_run(tiny_runs))], []
    with locked(folder) as mine:  # a lock belongs to an open file, so that one process can play both
        assert mine
        assert run_cells(cells, tmp_path, seeds=(0,), score=lambda _: {}, log=said.append) == []
    assert said == ["token seed 0: another process is at it"]
    with locked(folder) as mine:
        assert mine


def test_a_grid_is_every_combination_under_its_own_name(tiny_runs):
    cells = [Cell(name="calm", run=latent_run(tiny_runs))]
    axes = parse_axes(["loss.terms.auxiliary.weight=0,3", "train.optimizer.learning_rate=1e-3"])
    found = grid(cells, axes)
    assert [cell.name for cell in found] == [
        "calm-auxiliary.weight=0-learning_rate=1e-3",
        "calm-auxiliary.weight=3-learning_rate=1e-3",
    ]
    last = found[1].run
    assert isinstance(last, LatentLMRun) and last.loss.weight("auxiliary") == 3.0 and last.train.optimizer.learning_rate == 1e-3
    with pytest.raises(UsageError, match="expected one of 'energy'.*got 'auxilary'"):
        grid(cells, {"loss.terms.auxilary.weight": ["1"]})
    with pytest.raises(UsageError, match="expected KEY=VALUE,VALUE"):
        parse_axes(["loss.alpha"])


def test_cells_of_one_name_are_refused(tiny_runs, tmp_path):
    cell = Cell(name="token", run=token_run(tiny_runs))
    with pytest.raises(UsageError, match="two cells have one name"):
        run_cells([cell, cell], tmp_path, seeds=(0,), score=lambda _: {})


def test_intervals_over_seeds_are_students():
    assert over_seeds([1.5]) == "1.500"
    assert over_seeds([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.3027 / sqrt(3)
    assert (
        over_seeds([float(seed) for seed in range(16)]) == "7.500 ± 2.537"
    )  # 2.1314 * 4.7610 / sqrt(16); 1.96 would give 2.333
    results = [{"cell": "a", "x": 1.0}, {"cell": "b", "x": None}, {"cell": "a", "x": 3.0}]
    lines = results_table(results, {"x": lambda result: result["x"]}).splitlines()
    assert any(line.split()[:3] == ["a", "2", "2.000"] for line in lines) and any(line.split()[-1] == "-" for line in lines)


@pytest.mark.parametrize("name", ["chunk-sizes", "recipes", "stems", "reasoner-on-z", "losses"])
def test_every_study_is_made_of_runs_that_can_be_built(name, tmp_path):
    """Their configurations survive being written and read, and their names differ."""
    from calm import config

    study, place = catalogue.get(name), Place("data", tmp_path)
    assert isinstance(study, LanguageModelStudy)
    cells = [*study.autoencoders(place), *study.cells(place, 1e12)]
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        (tmp_path / "config.toml").write_text(config.to_toml(cell.run))
        assert config.load(type(cell.run), [tmp_path / "config.toml"]) == cell.run


def test_what_cells_wrote_stands_beside_their_score_and_the_text_itself():
    def writing(bits: float, repeated: float) -> dict:
        return {"bits_per_byte": {"estimate": bits}, "repeated_4": {"estimate": repeated}, "distinct_2": 0.5}

    def result(cell: str, brier_lm: float, bits: float) -> dict:
        both = {cell: writing(bits, 0.125), "bigram": writing(9.0, 0.0), "held-out text": writing(1.5, 0.0625)}
        return {"cell": cell, "brier_lm": brier_lm, "writing T=1": both, "writing T=.5": both}

    results = [result("token", 2.0, 2.25), result("calm", 1.5, 3.25)]
    text = results_table([*results, _held_out(results)], WRITING_COLUMNS)
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:]]
    assert rows[0][:5] == ["token", "1", "2.000", "2.250", "12.500"]
    assert rows[1][:5] == ["calm", "1", "1.500", "3.250", "12.500"]
    assert rows[2][:5] == ["held-out text", "1", "-", "1.500", "6.250"]
    unwritten = results_table([{"cell": "token", "brier_lm": 2.0}], WRITING_COLUMNS).splitlines()[2]
    assert unwritten.split() == ["token", "1", "2.000", *["-"] * 6]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_from_the_command_line(tiny_runs, tmp_path, monkeypatch):
    class Small(LanguageModelStudy):
        chunk_sizes = ()

        def cells(self, place: Place, budget: float | None) -> list[Cell]:
            return [Cell(name="token", run=token_run(tiny_runs)), Cell(name="calm", run=latent_run(tiny_runs), budget=budget)]

    monkeypatch.setitem(catalogue.STUDIES, "stems", Listing("a small one", Small))
    words = ["--data", str(tiny_runs / "data"), "--out", str(tmp_path), "--split", "valid", "--max-tokens", "768"]
    words += ["--precision", "float32"]
    result = tiny.run("experiment", "stems", *words, "--bound-samples", "2", "--texts", "2", "--speed-tokens", "8")
    token, calm = result["results"]
    assert token["nats_per_token"] > 0 and calm["nats_per_token_at_most"] > 0
    assert set(calm["generated_tokens_per_second"]) == {"T=1 B=1", "T=.5 B=1", "T=1 B=8", "T=.5 B=8"}
    assert "writing T=.5" in calm
    assert "calm - token" in result["summary"] and (tmp_path / "stems.md").read_text().strip() == result["summary"].strip()
    again = tiny.run("experiment", "stems", *words)
    assert json.dumps(again["results"]) == json.dumps(result["results"])
    code, answer, _ = tiny.calm("experiment", "stem", *words)
    assert code == 2 and "did you mean 'stems'" in answer["error"]
    code, answer, _ = tiny.calm("experiment", "stems", *words[2:])
    assert code == 2 and "stems: needs --data" in answer["error"]
    code, answer, _ = tiny.calm("experiment", "stems", *words, "--only", "tokens")
    assert code == 2 and "there is no cell 'tokens'; there are: token, calm" in answer["error"]


@pytest.fixture
def count(monkeypatch):
    """A study of another package, registered by its decorator."""
    monkeypatch.setattr(catalogue, "STUDIES", dict(catalogue.STUDIES))

    @catalogue.register("count", "how many seeds were asked for")
    class Count:
        options = frozenset(("budget",))

        def run(self, request: Request) -> dict:
            return request.written([{"seeds": len(request.seeds), "budget": request.budget}], request.title)

    return Count


def test_a_registered_study_runs_and_other_options_are_refused(count, tmp_path):
    result = tiny.run("experiment", "count", "--out", str(tmp_path / "x"), "--seeds", "4", "5", "--budget", "3e9")
    assert result["results"] == [{"seeds": 2, "budget": 3e9}]
    assert (tmp_path / "x" / "count.md").read_text() == "count: how many seeds were asked for\n"
    for words, option in (
        (("--data", "d"), "--data"),
        (("--speed-tokens", "3"), "--speed-tokens"),
        (("--grid", "a=1"), "--grid"),
    ):
        code, answer, _ = tiny.calm("experiment", "count", "--out", str(tmp_path), *words)
        assert code == 2 and f"count: has no use for {option}; leave it out" in answer["error"]
    with pytest.raises(UsageError, match="seeds must be one or more different numbers"):
        Request(name="count", out=tmp_path, seeds=(1, 1))


def test_a_name_is_registered_once(count):
    assert isinstance(catalogue.get("count"), count)
    with pytest.raises(UsageError, match="study 'count': the name is taken"):
        catalogue.register("count", "another")(count)


@pytest.mark.parametrize("name", catalogue.STUDIES)
def test_every_listed_study_exists(name):
    assert isinstance(catalogue.get(name), catalogue.Study)


def test_help_lists_all_studies_without_jax(tmp_path):
    """Those of the package and one of another module, in a process of its own."""
    (tmp_path / "depths.py").write_text(
        "from calm.studies.catalogue import register\n"
        "@register('depths', 'how many layers')\n"
        "class Depths:\n    options = frozenset()\n    def run(self, request): ...\n"
    )
    code = "import depths, sys; from calm.cli import main; main(['experiment', '--help']); sys.exit('jax' in sys.modules)"
    paths = os.pathsep.join([str(tmp_path), str(Path(catalogue.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, listing in {**catalogue.STUDIES, "depths": Listing("how many layers", object)}.items():
        assert f"{name:14} {listing.summary}" in done.stdout
