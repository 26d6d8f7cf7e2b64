"""The exponent of the energy score: refused outside (0, 2), warned of below 1, named when a run diverges."""

import pytest

import tiny
from calm.core.objective import LatentLossConfig
from calm.errors import UsageError


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 2.0, 3.0])
def test_an_alpha_that_gives_no_proper_score_is_refused(alpha):
    with pytest.raises(UsageError, match=r"alpha must lie in \(0, 2\)"):
        LatentLossConfig(alpha=alpha)


def test_a_small_alpha_is_warned_of_and_divergence_names_it(tiny_runs, tmp_path):
    words = ["train", "lm", "--data", str(tiny_runs / "data"), "--autoencoder", str(tiny_runs / "autoencoder")]
    wild = ["--loss.alpha", "0.75", "--train.optimizer.learning-rate", "1e30", "--train.optimizer.warmup-steps", "0"]
    code, result, err = tiny.calm(*words, *tiny.LM, *wild, "--out", str(tmp_path / "run"))
    assert code == result["exit_code"] == 3, err
    assert "loss.alpha is 0.75" in err and "not finite at step" in err
    assert "warning: loss.alpha=0.75 is below 1" in (tmp_path / "run" / "log.txt").read_text()
