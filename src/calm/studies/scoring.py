"""Scores of a trained cell, and tables over seeds."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int
from scipy import stats

from calm.core.generate import SpecialIds, generate
from calm.core.intervals import BlockSums
from calm.core.sampler import PlainSampler
from calm.core.temperature import BatchTemperature
from calm.errors import UsageError
from calm.evaluate.closed_form import score_ngram
from calm.evaluate.ngram import fit_ngrams
from calm.evaluate.scores import BrierReport, Comparison, compare
from calm.evaluate.tables import interval_text, table
from calm.rng import row_keys
from calm.runs import bundle
from calm.runs.evaluation import backbone_use, likelihood_bound, score_writing, vector_use
from calm.runs.stages import validation_blocks
from calm.studies.runner import cell_folder
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler

BRIER = "brier.json"
Column = Callable[[Mapping[str, Any]], float | None]
"""value of a cell's result in a table; None where it has none"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelScore:
    """Measurements on a language model; `score(folder)` returns the entries for the cell's result."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    split: str = "test"
    max_tokens: int = 64 * 1024
    vector_tokens: int = 8 * 1024
    """tokens on which it is measured whether the decoder uses its vector"""
    bound_tokens: int = 8 * 1024
    bound_samples: int = 64
    """S of the likelihood bound; 0 = no bound"""
    judge: str | None = None
    """run of an independent token model that scores what the cell writes"""
    texts: int = 0
    """continuations to write and score; 0 = none"""
    speed_tokens: int = 0
    """tokens to generate for a measurement of speed, which needs an idle machine; 0 = none"""

    def __call__(self, folder: Path) -> dict[str, Any]:
        model = bundle.load(folder, precision=self.precision)
        scores = model.evaluate(split=self.split, max_tokens=self.max_tokens, noise=())
        report: BrierReport = scores["lm"]
        report.save(folder / BRIER)
        found: dict[str, Any] = {
            "protocol": report.protocol.line(),
            "brier_lm": report.brier_lm.estimate,
            "brier_n": [interval.estimate for interval in report.brier_n],
            "baselines": {
                scores[name].name: {
                    "brier_lm": scores[name].brier_lm.estimate,
                    "brier_n": [interval.estimate for interval in scores[name].brier_n],
                    "nats_per_token": scores[name].nats_per_token.estimate,
                }
                for name in ("bigram", "kn5", "kn5+cache")
            },
        }
        use = vector_use(model, split=self.split, max_tokens=self.vector_tokens)
        found["vector"] = {"verdict": use.verdict, "label": use.label} | use.scalars()
        if model.autoencoder is not None and model.lm is not None:
            backbone = backbone_use(model, split=self.split, max_tokens=self.vector_tokens)
            if backbone is not None:
                found["backbone"] = {"verdict": backbone.verdict, "cost": backbone.cost("foreign").estimate}
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


def held_out(
    folder: Path, score: LanguageModelScore
) -> tuple[bundle.Bundle, TokenLM, Int[np.ndarray, "R T"], Int[np.ndarray, "R"]]:
    """A trained token model, with blocks of held-out text and their documents. Raises UsageError for another kind of run."""
    model = bundle.load(folder, precision=score.precision)
    if not isinstance(model.lm, TokenLM):
        raise UsageError(f"{folder}: holds no token model")
    blocks, documents = validation_blocks(model.prepared_data(None), model.block_tokens, score.split, score.max_tokens)
    return model, model.lm, blocks, documents


def unigram_nats(model: bundle.Bundle, blocks: Int[np.ndarray, "R T"], documents: Int[np.ndarray, "R"]) -> float:
    """Nats per token of the unigram model of the training text."""
    unigram, _ = fit_ngrams(model.prepared_data(None).split("train"), model.tokenizer.vocab_size)
    likelihood = score_ngram(unigram, blocks, documents).likelihood
    assert likelihood is not None
    return float(likelihood.means[0])


def generation_speed(model: bundle.Bundle, num_tokens: int, batches: Sequence[int] = (1, 8)) -> dict[str, float]:
    """Tokens per second at T = 1, and at T = .5 by votes of 200 draws (by the softmax for a token model): the median of
    three calls after one that compiles. The end id is outside the vocabulary, so all rows have one length.
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


def over_seeds(values: Sequence[float | int]) -> str:
    """`mean ± half width` of Student's 95 % interval over seeds; the value alone for one seed."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.3f}"


def results_table(results: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """One row a cell: means with intervals over its seeds; `-` where a column has no value."""
    rows = []
    for name, own in by_cell(results).items():
        row = [row_name(name, own), str(len(own))]
        for column in columns.values():
            values = [value for value in map(column, own) if value is not None]
            row.append(over_seeds(values) if values else "-")
        rows.append(row)
    return table(["cell", "seeds", *columns], rows)


def row_name(name: str, own: Sequence[Mapping[str, Any]]) -> str:
    """A cell's name, with what its model is where no seed of it uses its vector."""
    labels = {result.get("vector", {}).get("label", "") for result in own}
    return f"{name}: {labels.pop()}" if len(labels) == 1 and labels != {""} else name


def baselines_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The counted baselines on the text that the cells are scored on; the empty string where no cell has any."""
    found = next((result["baselines"] for result in results if result.get("baselines")), {})
    rows = [
        [name, *(f"{value:.3f}" for value in (*of["brier_n"], of["brier_lm"], of["nats_per_token"]))]
        for name, of in found.items()
    ]
    return table(["counted", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "BrierLM", "nats"], rows) if rows else ""


def by_cell(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Results of all seeds, cell by cell."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["cell"], []).append(result)
    return groups


LANGUAGE_MODEL_COLUMNS: dict[str, Column] = {
    "tokens, M": lambda result: result["tokens"] / 1e6,
    "FLOPs, 1e12": lambda result: result["training_flops"] / 1e12,
    "Brier-1": lambda result: result["brier_n"][0],
    "Brier-2": lambda result: result["brier_n"][1],
    "BrierLM": lambda result: result["brier_lm"],
    "nats (<= for CALM)": lambda result: result.get("nats_per_token", result.get("nats_per_token_at_most")),
    "bits/byte (<=)": lambda result: result.get("bits_per_byte", result.get("bits_per_byte_at_most")),
    "vector cost": lambda result: result.get("vector", {}).get("vector_cost"),
    "backbone cost": lambda result: result.get("backbone", {}).get("cost"),
    "writes, T=1": lambda result: result.get("generated_tokens_per_second", {}).get("T=1 B=1"),
    "writes, T=.5": lambda result: result.get("generated_tokens_per_second", {}).get("T=.5 B=1"),
}


def _written(temperature: str, measure: str, factor: float = 1.0) -> Column:
    """A column for the cells' continuations: a measure of `calm.evaluate.writing.Writing`."""

    def of(result: Mapping[str, Any]) -> float | None:
        own = next(iter(result.get(f"writing {temperature}", {}).values()), {})  # the model's own texts come first
        value = own.get(measure)
        value = value["estimate"] if isinstance(value, Mapping) else value
        return None if value is None else factor * value

    return of


WRITING_COLUMNS: dict[str, Column] = {
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
    """The mean, block by block, of the scores of several seeds on the same text.

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


def brier_table(out: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """BrierLM of every cell, the mean of its seeds, with its interval over the text."""
    rows = []
    for name, own in by_cell(results).items():
        folders = [cell_folder(out, name, result["seed"]) for result in own]
        folders = [folder for folder in folders if (folder / BRIER).is_file()]
        rows.append([name, interval_text(mean_report(folders).brier_lm) if folders else "-"])
    note = "BrierLM with its 95 % interval by bootstrap over the text, each cell the mean of its seeds"
    return f"{table(['cell', 'BrierLM'], rows)}\n\n{note}"
