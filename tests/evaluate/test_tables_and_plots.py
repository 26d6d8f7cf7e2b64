"""Tables hold the numbers with their intervals; pictures are drawn without a display and from half-written files."""

import json
import math

import numpy as np
import pytest

from calm.core.brier_lm import Protocol, TextProtocol
from calm.core.intervals import BlockSums, Interval
from calm.errors import UsageError
from calm.evaluate.plots import brier_bars, noise_curves, read_metrics, training_curves
from calm.evaluate.scores import AutoencoderReport, BrierReport, NoisyAccuracy, brier_table
from calm.evaluate.tables import interval_text, table

TEXT = TextProtocol(dataset="toy", sha256="0" * 64, split="valid", tokenizer="t", block_tokens=1024, chunk_size=4)


def brier_report(name: str, scale: float) -> BrierReport:
    generator = np.random.default_rng(0)
    scores = scale * np.array([0.1, 0.03, 0.01, 0.004]) * generator.uniform(0.5, 1.5, (40, 4))
    count = np.full(40, 255.0)
    sums = BlockSums(total=scores * 255, count=count, document=np.arange(40), block_tokens=1024)
    protocol = Protocol(**TEXT.to_dict(), num_samples=8, decoding="argmax")
    return BrierReport(name=name, protocol=protocol, scores=sums)


def autoencoder_report(name: str, slope: float) -> AutoencoderReport:
    def accuracy(value: float) -> Interval:
        return Interval(estimate=value, low=value - 0.01, high=min(value + 0.01, 1.0), units=40)

    noise = [
        NoisyAccuracy(
            sigma=s, relative=s, tokens=accuracy(math.exp(-slope * s**2)), chunks=accuracy(math.exp(-4 * slope * s**2))
        )
        for s in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8)
    ]
    return AutoencoderReport(
        name=name,
        protocol=TEXT,
        noise=noise,
        sampled=noise[2],
        posterior_std=0.25,
        aggregate_std=1.0,
        posterior_std_relative=0.25,
        kl=90.0,
        latent_dim=64,
        active_dimensions=64,
    )


def test_columns_line_up_and_markdown_has_its_bars():
    rows = [["a", "1.00"], ["longer", "12.34"]]
    assert table(["model", "x"], rows).splitlines() == ["model       x", "------  -----", "a        1.00", "longer  12.34"]
    markdown = table(["model", "x"], rows, markdown=True).splitlines()
    assert markdown[1] == "|--------|------:|" and markdown[3] == "| longer | 12.34 |"


def test_an_interval_is_shown_if_there_is_one():
    assert interval_text(Interval(estimate=1.234, low=1.0, high=2.0)) == "1.23 [1.00, 2.00]"
    assert interval_text(Interval(estimate=1.234, low=math.nan, high=math.nan)) == "1.23"
    assert interval_text(None) == "-"


def test_the_table_names_every_protocol_and_the_unit_of_its_intervals():
    text = brier_table([brier_report("one", 1), brier_report("two", 2)])
    assert text.count("S=8, argmax decoding") == 1 and "40 x document" in text and "two" in text


def test_pictures_are_written(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 5 / (1 + s), "ok": True, "note": "x"}) for s in range(50)]
    lines += [json.dumps({"step": s, "valid/brier_lm": s / 50}) for s in (0, 25, 49)]
    metrics.write_text("\n".join([*lines, '{"step": 50, "lo']))
    assert set(read_metrics(metrics)) == {"loss", "valid/brier_lm"}
    training_curves(metrics, tmp_path / "curves.png")
    training_curves({"one": metrics, "two": metrics}, tmp_path / "two.svg", names=["loss"])
    brier_bars([brier_report("unigram", 0.4), brier_report("bigram", 0.9), brier_report("CALM", 1.3)], tmp_path / "bars.png")
    noise_curves([autoencoder_report("Z=64", 1.0), autoencoder_report("Z=128", 0.3)], tmp_path / "noise.png")
    for name in ("curves.png", "bars.png", "noise.png", "two.svg"):
        assert (tmp_path / name).stat().st_size > 4000


def test_metrics_without_the_measurement_are_named(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(UsageError, match=r"metrics.jsonl: No such file"):
        read_metrics(metrics)
    metrics.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UsageError, match="no measurement lost in the metrics; there are: loss"):
        training_curves(metrics, tmp_path / "a.png", names=["lost"])
