"""Rank correlation: right on known orders, and the study runs on a world from end to end."""

import numpy as np
import pytest

from calm.errors import UsageError
from calm.studies.correlation import REGIMES, run, spearman
from calm.text.prepare import prepare


def test_spearman_on_known_orders():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(values, values**3) == 1 and spearman(values, -np.exp(values)) == -1
    assert spearman(values, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert spearman(np.array([1.0, 1.0, 2.0, 2.0]), values) == pytest.approx(2 / np.sqrt(5))
    assert np.isnan(spearman(np.ones(4), values))


def test_the_study_runs_on_a_world(tmp_path):
    prepare("world:markov:words=12,tokens=20k", tmp_path / "data", quiet=True)
    with pytest.raises(UsageError, match="at least two"):
        run(tmp_path / "data", tmp_path, sizes=(8,), checkpoints=(2,))
    result = run(tmp_path / "data", tmp_path, sizes=(8,), regimes=REGIMES[:1], checkpoints=(2, 40), max_tokens=4096, quiet=True)
    first, last = result["checkpoints"]
    assert last["nats_per_token"] < first["nats_per_token"] and last["brier_lm"] > first["brier_lm"]
    assert result["spearman"]["brier_lm"] == 1 and result["protocol"]["boundary_every"] == 4
    assert "BrierLM" in (tmp_path / "correlation.txt").read_text()
