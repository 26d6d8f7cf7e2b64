"""The study of alignment: pooling of cells, its report, and one run from end to end."""

import random

import numpy as np
import pytest

import tiny
from calm.errors import UsageError
from calm.studies import catalogue
from calm.studies.alignment import ROLLED_BACK, against, fluency_cost, picture, pooled, report, rolled_back, verdict
from calm.studies.study import Request
from calm.ttt.align import CONTROLS

WAYS = ("standard", "aligned", *CONTROLS)


def result(steps, seed, gains):
    """A cell of 40 prompts, in which a variant's texts score its gain above the standard ones, with some noise."""
    draw = np.random.default_rng(seed)
    base = draw.normal(size=40)

    def way(number, name):
        scores = base + gains.get(name, 0.0) + 0.1 * draw.normal(size=40)
        share = np.stack([np.full(40, 3.0), np.full(40, 30.0 + number)], axis=1).tolist()
        counted = {"repeated": share, "concept words": share, "function words": share}
        judged = np.stack([scores, np.ones(40)], axis=1).tolist()
        flops = 1e9 * (1 if name in ("standard", "steering") else steps)
        return {"flops": flops, "reward": [0.0] * 40, "judge": judged, "fluency": judged, **counted}

    facts = dict(concept="war", found_in=9, classifier_area=0.9, texts_of_best=4, fluency_of="bits/byte by the judge")
    numbers = dict(reward_before=0.0, reward_after=0.5, drift=0.1)
    ways = {name: way(i, name) for i, name in enumerate(WAYS)}
    return rolled_back({"steps": steps, "seed": seed, **facts, **numbers, "ways": ways})


def test_ways_are_compared_prompt_by_prompt_over_all_cells():
    results = [result(3, seed, {"aligned": 1.0, "best of S": 0.4}) for seed in (0, 1)]
    sums = pooled(results, "aligned", "judge")
    assert sums.count.tolist() == [2] * 40
    np.testing.assert_allclose(sums.total[:, 0], sum(np.array(r["ways"]["aligned"]["judge"])[:, 0] for r in results))
    interval = against(results, "aligned", "standard")
    assert interval.low < 1.0 < interval.high and interval.high - interval.low < 0.2 and interval.units == 40
    assert against(results, "shuffled reward", "standard").low < 0.05


def test_costs_that_cancel_in_the_mean_stand_apart_by_concept():
    found = []
    for concept, bits in (("war", 2.4), ("river", 1.6)):
        one = result(3, 0, {}) | {"concept": concept}
        one["ways"]["standard"]["fluency"], one["ways"]["aligned"]["fluency"] = [[2.0, 1.0]] * 40, [[bits, 1.0]] * 40
        found.append(one)
    assert fluency_cost(found, "aligned").estimate == pytest.approx(0.0, abs=1e-9)
    text = report(found, "align")
    lines = [line for line in text.splitlines() if line.split()[1:2] == ["aligned"]]
    war, river = (next(line for line in lines if line.startswith(name)) for name in ("war", "river"))
    assert "20.0 [20.0, 20.0]" in war and "-20.0 [-20.0, -20.0]" in river


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"aligned": 1.0, "best of S": 0.2}, "Weight updates beat the best of 4 texts at equal FLOPs: 0."),
        ({"aligned": 0.2, "best of S": 1.0}, "Weight updates lose to the best of 4 texts at equal FLOPs: -0."),
        ({}, "Weight updates do not differ from the best of 4 texts at equal FLOPs"),
    ],
)
def test_it_is_said_plainly_whether_weight_updates_beat_best_of_s(gains, said):
    assert said in verdict([result(3, 0, gains)], "aligned")


def test_what_fluency_costs_is_a_share_of_the_standard_texts():
    found = result(3, 0, {})
    for way, bits in (("standard", 2.0), ("aligned", 2.2)):
        found["ways"][way]["fluency"] = [[bits + 0.01 * row, 1.0] for row in range(40)]
    cost = fluency_cost([found], "aligned")
    assert cost.estimate == pytest.approx(0.2 / 2.195) and cost.low <= cost.estimate <= cost.high
    assert "Fluency costs them 9.1 [9.1, 9.1] % more" in verdict([found], "aligned")


def test_texts_that_read_much_worse_give_way_to_the_standard_ones_and_both_are_paid_for():
    found = result(3, 0, {"aligned": 1.0})
    found["ways"].pop(ROLLED_BACK)
    bits = [2.0 if row % 4 else 2.5 for row in range(40)]  # every fourth aligned text reads 25 % worse
    found["ways"]["standard"]["fluency"], found["ways"]["aligned"]["fluency"] = [[2.0, 1.0]] * 40, [[x, 1.0] for x in bits]
    kept = rolled_back(found)
    way, standard, aligned = (kept["ways"][name] for name in (ROLLED_BACK, "standard", "aligned"))
    assert list(kept["ways"])[:3] == ["standard", "aligned", ROLLED_BACK] and kept["share_rolled_back"] == 0.25
    for row in range(40):
        assert way["judge"][row] == (aligned if row % 4 else standard)["judge"][row]
    assert fluency_cost([kept], ROLLED_BACK).estimate == 0 and way["flops"] == aligned["flops"] + standard["flops"]
    assert 0.7 < against([kept], ROLLED_BACK, "standard").estimate < 0.8
    assert "undone where a text reads more than 20% worse (25% of them)" in verdict([kept], ROLLED_BACK)


def test_the_table_has_every_way_and_the_picture_is_drawn(tmp_path):
    results = [result(steps, 0, {"aligned": 1.0}) for steps in (1, 3)]
    text = report(results, "align")
    assert all(f"\n{name}" in text for name in ("standard", "aligned", "best of 4", "steering")) and "3 inner steps" in text
    assert text.count("Weight updates beat") == 2 and text.count("undone where") == 2
    picture(results, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").stat().st_size > 5000


def test_a_study_without_a_model_and_concepts_of_one_name_are_refused(tmp_path):
    study = catalogue.get("align")
    with pytest.raises(UsageError, match="needs --model"):
        study.run(Request(name="align", out=tmp_path, data="data"))
    with pytest.raises(UsageError, match="two concepts begin with the same word"):
        study.run(Request(name="align", out=tmp_path, data="data", model="runs/lm", concepts=("war,army", "war,peace")))
    code, found, _ = tiny.calm("experiment", "stems", "--data", "x", "--out", str(tmp_path), "--concept", "war")
    assert code == 2 and "has no use for --concept" in found["error"]


@pytest.mark.slow
def test_a_cell_runs_once_and_is_read_back(tiny_runs, tmp_path):
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for name in ("train", "valid", "test"):  # stretches with the concept and stretches without
        kinds = [draw.choice((["king", "road"], ["cat", "dog"])) for _ in range(40)]
        lines = [f"The {draw.choice(kind)} sees the {draw.choice(['river', 'stone'])}." for kind in kinds for _ in range(12)]
        (tmp_path / "text" / f"{name}.txt").write_text(" ".join(lines))
    data, out = str(tmp_path / "data"), tmp_path / "study"
    tokenizer = str(tiny_runs / "data" / "tokenizer.json")
    tiny.run("data", "prepare", "--source", str(tmp_path / "text"), "--out", data, "--tokenizer", tokenizer)
    words = ["experiment", "align", "--data", data, "--model", str(tiny_runs / "lm"), "--concept", "king,road", "--texts", "2"]
    words += ["--out", str(out), "--only", "king-steps-3"]
    first = tiny.run(*words)
    (cell,) = first["results"]
    assert cell["cell"] == "king-steps-3" and set(cell["ways"]) == {*WAYS, ROLLED_BACK} and cell["texts_of_best"] >= 1
    assert all(len(way["judge"]) == 2 for way in cell["ways"].values()) and len(set(cell["example"].values())) > 1
    assert (out / "align.png").is_file() and "Weight updates" in (out / "align.md").read_text()
    before = (out / "king-steps-3" / "seed-0" / "result.json").stat().st_mtime_ns
    assert tiny.run(*words)["summary"] == first["summary"]
    assert (out / "king-steps-3" / "seed-0" / "result.json").stat().st_mtime_ns == before
    code, found, _ = tiny.calm(*words[:-2], "--only", "king-steps-3", "--split", "valid")
    assert code == 2 and "other settings" in found["error"]
