"""What is measured on a cell when it is trained, and the tables over seeds."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from calm.core import generate
from calm.core.generate import SpecialIds
from calm.core.intervals import BlockSums
from calm.core.sampler import PlainSampler
from calm.core.temperature import BatchTemperature
from calm.evaluate.scores import BrierReport, Comparison, compare
from calm.evaluate.tables import table
from calm.rng import row_keys
from calm.runs import bundle
from calm.runs.measure import likelihood_bound
from calm.runs.writing import score_writing
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler

BRIER = "brier.json"
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""two-sided 95 % points of Student's t for so many seeds"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelScore:
    """Scores of a language model's cell: `score(folder)` gives what goes into its result."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    split: str = "test"
    max_tokens: int = 64 * 1024
    bound_tokens: int = 8 * 1024
    bound_samples: int = 64
    """S of the likelihood bound; 0 leaves the bound out"""
    judge: str | None = None
    """run of an independent token model that reads what the cell writes"""
    texts: int = 0
    """continuations to write for it; 0 = none"""
    speed_tokens: int = 0
    """tokens to generate when speed is measured; 0 = speed is not. Measure speed with nothing else running"""

    def __call__(self, folder: Path) -> dict[str, Any]:
        model = bundle.load(folder, precision=self.precision)
        scores = model.evaluate(split=self.split, max_tokens=self.max_tokens, noise=())
        report: BrierReport = scores["lm"]
        report.save(folder / BRIER)
        found: dict[str, Any] = {
            "protocol": report.protocol.line(),
            "brier_lm": report.brier_lm.estimate,
            "brier_n": [interval.estimate for interval in report.brier_n],
            "bigram_brier_lm": scores["bigram"].brier_lm.estimate,
        }
        if report.nats_per_token is not None and report.bits_per_byte is not None:
            found |= {"nats_per_token": report.nats_per_token.estimate, "bits_per_byte": report.bits_per_byte.estimate}
        elif self.bound_samples:
            options: dict[str, Any] = dict(split=self.split, max_tokens=self.bound_tokens, num_samples=self.bound_samples)
            bound = likelihood_bound(model, **options)
            nats = bound.nats_per_token.estimate
            found |= {"nats_per_token_at_most": nats, "bits_per_byte_at_most": bound.bits_per_byte(nats)}
        if self.texts:
            judge = None if self.judge is None else bundle.load(self.judge, precision=self.precision)
            for name, temperature in (("T=1", "1"), ("T=.5", "1/2")):
                quality = score_writing(model, judge=judge, split=self.split, samples=self.texts, temperature=temperature)
                found[f"writing {name}"] = {text.name: text.to_dict() for text in quality.writings}
        if self.speed_tokens:
            found["generated_tokens_per_second"] = generation_speed(model, self.speed_tokens)
        return found


def generation_speed(model: bundle.Bundle, num_tokens: int, batches: Sequence[int] = (1, 8)) -> dict[str, float]:
    """Tokens per second in generation at T = 1, and at T = .5 by votes of 200 draws (by the softmax for a token model): the
    median of three calls after one that compiles. The end id is out of reach, so that every row is as long.
    """
    predictor, rates = model.predictor, {}
    half = SoftmaxSampler(temperature=0.5) if isinstance(model.lm, TokenLM) else BatchTemperature(num_candidates=200)
    special = SpecialIds(begin_id=model.tokenizer.begin_id, end_id=predictor.vocab_size, mask_id=model.tokenizer.mask_id)
    for batch in batches:
        prompts = [np.arange(16, dtype=np.int32) + 100] * batch
        for name, sampler in (("T=1", PlainSampler()), ("T=.5", half)):
            seconds = []
            for call in range(4):
                began = time.perf_counter()
                keys = row_keys(jax.random.key(call), batch)
                options: dict[str, Any] = dict(special=special, max_tokens=num_tokens, decoding=predictor.decoding)
                generate(predictor, prompts, keys, sampler=sampler, **options)
                seconds.append(time.perf_counter() - began)
            rates[f"{name} B={batch}"] = batch * num_tokens / sorted(seconds[1:])[1]
    return rates


# -- over seeds -------------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> str:
    """`mean ± half width of the 95 % interval` over seeds, by Student's t; the value alone for one seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return f"{mean:.3f} ± {STUDENT_T.get(len(values), 1.96) * spread:.3f}"


def results_table(
    results: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], float | None]]
) -> str:
    """One row a cell: means with intervals over its seeds; `-` where a column has no value."""
    rows = []
    for name in dict.fromkeys(result["cell"] for result in results):
        own = [result for result in results if result["cell"] == name]
        row = [name, str(len(own))]
        for column in columns.values():
            values = [value for value in map(column, own) if value is not None]
            row.append(over_seeds(values) if values else "-")
        rows.append(row)
    return table(["cell", "seeds", *columns], rows)


LANGUAGE_MODEL_COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "tokens, M": lambda result: result["tokens"] / 1e6,
    "FLOPs, 1e12": lambda result: result["training_flops"] / 1e12,
    "Brier-1": lambda result: result["brier_n"][0],
    "Brier-2": lambda result: result["brier_n"][1],
    "BrierLM": lambda result: result["brier_lm"],
    "nats (<= for CALM)": lambda result: result.get("nats_per_token", result.get("nats_per_token_at_most")),
    "bits/byte (<=)": lambda result: result.get("bits_per_byte", result.get("bits_per_byte_at_most")),
    "writes, T=1": lambda result: result.get("generated_tokens_per_second", {}).get("T=1 B=1"),
    "writes, T=.5": lambda result: result.get("generated_tokens_per_second", {}).get("T=.5 B=1"),
}


def _written(temperature: str, measure: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], float | None]:
    """A column for what the cells wrote (`LanguageModelScore.texts`): a measure of `calm.evaluate.quality_report.Writing`."""

    def of(result: Mapping[str, Any]) -> float | None:
        own = next(iter(result.get(f"writing {temperature}", {}).values()), {})  # the model's own texts stand first
        value = own.get(measure)
        value = value["estimate"] if isinstance(value, Mapping) else value
        return None if value is None else factor * value

    return of


WRITING_COLUMNS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "BrierLM": lambda result: result["brier_lm"],
    **{
        f"{temperature}: {name}": _written(temperature, measure, factor)
        for temperature in ("T=1", "T=.5")
        for name, measure, factor in (
            ("judge's bits/byte", "bits_per_byte", 1.0),
            ("repeated 4-grams %", "repeated_4", 100.0),
            ("distinct-2 %", "distinct_2", 100.0),
        )
    },
}


def mean_report(folders: Sequence[Path]) -> BrierReport:
    """The scores of several seeds on the same blocks, as one: block by block their mean.

    Two such reports are compared by paired bootstrap over the text; the spread over seeds is reported apart.
    """
    reports = [BrierReport.load(folder / BRIER) for folder in folders]
    first = reports[0]
    for report in reports[1:]:
        first.protocol.require_comparable(dataclasses.replace(report.protocol, seed=first.protocol.seed))
    total = np.mean([report.scores.total for report in reports], axis=0)
    scores = BlockSums(
        total=total, count=first.scores.count, document=first.scores.document, block_tokens=first.scores.block_tokens
    )
    return dataclasses.replace(first, scores=scores, energy=None, likelihood=None)


def against(folders: Mapping[str, Sequence[Path]], baseline: str) -> list[Comparison]:
    """Every cell against the baseline, each as the mean of its seeds."""
    reports = {name: dataclasses.replace(mean_report(paths), name=name) for name, paths in folders.items() if paths}
    if baseline not in reports:
        return []
    return [compare(report, reports[baseline]) for name, report in reports.items() if name != baseline]
