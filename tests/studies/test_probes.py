"""Gate statistics: against numbers worked out by hand, and the rows and the picture that they are left in."""

import csv
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.errors import UsageError
from calm.hybrid.taps import tapped
from calm.runs.stages import TokenLMRun
from calm.studies import catalogue as studies
from calm.studies import gates as probes
from calm.studies import path_ablation
from calm.studies.gates import COLUMNS, ProbeStudy, draw_gates, gate_rows, gate_statistics
from calm.studies.runner import Cell
from calm.studies.study import Request, Study
from calm.token.model import TokenLMConfig

BACKBONE = BackboneConfig(dim=16, num_layers=2, pattern="C,SHA", num_heads=2, num_kv_heads=2, inner_dim=16, num_segments=2)


def model(**settings):
    return TokenLMConfig(vocab_size=20, backbone=dataclasses.replace(BACKBONE, **settings)).build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (11, 5)).astype(np.int32)  # more rows than a batch


def test_statistics_are_those_of_the_readings_over_all_rows(tokens):
    lm = model()
    gates = gate_statistics(lm, tokens)
    read = lm.backbone.readings(lm.stem(jnp.asarray(tokens)), ("gate",))["gate"]
    assert [(gate.segment, gate.layer, gate.paths) for gate in gates] == [(0, 1, "SHA"), (1, 1, "SHA")]
    assert sorted(read) == [1, 3]
    for gate, place in zip(gates, (1, 3), strict=True):
        shares = np.asarray(read[place])
        assert gate.mean == pytest.approx(shares.mean(0), abs=1e-5) and gate.std == pytest.approx(shares.std(0), abs=1e-5)
        assert gate.entropy == pytest.approx(-(shares * np.log(shares)).sum(-1).mean(0), abs=1e-5)
        assert gate.std.max() > 1e-3


@pytest.mark.parametrize(("shares", "entropy"), [((1.0, 0.0, 0.0), 0.0), ((0.5, 0.5, 0.0), np.log(2))])
def test_entropy_of_known_shares(tokens, shares, entropy):
    lm = tapped(model(), lambda name, layer, value: value * 0 + jnp.asarray(shares) if name == "gate" else value)
    for gate in gate_statistics(lm, tokens):
        assert gate.entropy == pytest.approx(np.full(5, entropy), abs=1e-6) and gate.std.max() < 1e-6
        assert gate.mean[0] == pytest.approx(shares)


def test_a_backbone_without_gates_is_refused(tokens):
    with pytest.raises(UsageError, match="pattern 'C,S' has no gate; put two or more letters into a group"):
        gate_statistics(model(pattern="C,S", num_segments=1), tokens)


def test_rows_have_their_columns(tokens):
    gates = gate_statistics(model(), tokens)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in gate_rows("SHA", 7, gates)]
    assert len(rows) == 2 * 5 * 3 and {row["path"] for row in rows} == set("SHA")
    assert {row["segment"] for row in rows} == {0, 1} and {row["position"] for row in rows} == set(range(5))
    for at in range(0, len(rows), 3):
        assert sum(float(row["mean"]) for row in rows[at : at + 3]) == pytest.approx(1, abs=1e-5)
        assert 0 < float(rows[at]["entropy"]) <= np.log(3) + 1e-6


def test_the_study_leaves_csv_and_pictures_of_gated_cells(tokens, tmp_path, monkeypatch):
    made = {"SHA": model(pattern="SHA"), "A": model(pattern="A", num_segments=1)}
    runs = {name: TokenLMRun(model=TokenLMConfig(backbone=lm.backbone.config)) for name, lm in made.items()}
    listed = [Cell(name=name, run=run) for name, run in runs.items()]
    monkeypatch.setattr(probes, "cells", lambda data, budget: listed)
    monkeypatch.setattr(path_ablation, "cells", lambda data, budget: listed)
    monkeypatch.setattr(path_ablation, "run_cells", lambda every, *rest, **options: [
        {"cell": cell.name, "seed": seed} for cell in every for seed in options["seeds"]
    ])  # fmt: skip
    monkeypatch.setattr(probes, "probe", lambda folder, score: gate_statistics(made[folder.parent.name], tokens))
    request = Request(name="probes", out=tmp_path, data="data", seeds=(0, 1))
    found = ProbeStudy().run(request)
    with open(tmp_path / "gates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 2 * 2 * 2 * 5 * 3 and {row["cell"] for row in rows} == {"SHA"}
    assert (tmp_path / "gates-SHA.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "gates-A.png").exists()
    assert "SHA segment 2 layer 1" in found["summary"] and (tmp_path / "probes.md").is_file()
    with pytest.raises(UsageError, match="there is no cell 'A'; there are: SHA"):
        ProbeStudy().run(dataclasses.replace(request, only=("A",)))
    assert isinstance(ProbeStudy(), Study) and studies.get("probes") == ProbeStudy()


def test_a_picture_of_groups_that_differ(tokens, tmp_path):
    gates = gate_statistics(model(pattern="SH,HA"), tokens)
    draw_gates([gates], "SH,HA", tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 1000
    assert [gate.paths for gate in gates] == ["SH", "HA", "SH", "HA"]
