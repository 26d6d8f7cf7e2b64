"""The main job: from plain text to a measured, generating model, in one call that goes on where it stopped."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from calm.core.intervals import Interval
from calm.evaluate.plots import brier_bars, noise_curves, training_curves
from calm.evaluate.scores import brier_table
from calm.runs import bundle, presets
from calm.runs.evaluation import backbone_use, vector_use
from calm.runs.stages import train_autoencoder, train_lm
from calm.text.atomic_write import write_whole
from calm.text.prepare import prepare
from calm.text.shards import open_data
from calm.train.run_folder import read_records

NOISE = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MAX_EVALUATION_TOKENS = 128 * 1024


def quickstart(
    out: str | Path,
    *,
    preset: str = "quickstart",
    source: str = "pydoc",
    separator: str | None = None,
    seed: int = 0,
    split: str = "valid",
    max_tokens: int = MAX_EVALUATION_TOKENS,
    quiet: bool = False,
) -> dict[str, Any]:
    """Prepares `source` into OUT/data, trains OUT/autoencoder and OUT/lm by the preset, scores them and writes the report.

    Returns what `calm quickstart` prints (`summary`), and the same as values. Interrupted, the same call goes on.
    """
    began, out, chosen = time.perf_counter(), Path(out), presets.get(preset)
    paths = {name: out / name for name in ("data", "autoencoder", "lm", "plots")}
    tokenizer = "auto" if source.startswith("world:") else chosen.tokenizer
    prepare(source, paths["data"], tokenizer, separator=separator, quiet=quiet)

    data = str(paths["data"])
    stage_1 = dataclasses.replace(chosen.autoencoder, data=data, train=dataclasses.replace(chosen.autoencoder.train, seed=seed))
    train_autoencoder(stage_1, paths["autoencoder"], quiet=quiet)
    stage_2 = dataclasses.replace(
        chosen.lm, data=data, autoencoder=str(paths["autoencoder"]), train=dataclasses.replace(chosen.lm.train, seed=seed)
    )
    train_lm(stage_2, paths["lm"], quiet=quiet)

    model = bundle.load(paths["lm"], precision="auto")
    scores = model.evaluate(split=split, max_tokens=max_tokens, noise=NOISE, seed=seed)
    continuations = _continue(model, data, seed)
    paths["plots"].mkdir(exist_ok=True)
    for stage in ("autoencoder", "lm"):
        training_curves(paths[stage] / "metrics.jsonl", paths["plots"] / f"training-{stage}.png")
    use = vector_use(model, split=split, seed=seed)
    backbone = backbone_use(model, split=split, seed=seed)
    findings = {"vector": use.finding, "backbone": "not measured" if backbone is None else backbone.finding}
    if use.verdict == "unused":
        scores["lm"] = dataclasses.replace(scores["lm"], name=use.label)
    reports = [scores[name] for name in ("unigram", "bigram", "kn5", "kn5+cache", "lm", "world") if name in scores]
    brier_bars(reports, paths["plots"] / "brier.png")
    noise_curves([scores["autoencoder"]], paths["plots"] / "noise.png")

    speed = _training_speed(paths["lm"])
    seconds = time.perf_counter() - began
    result = {
        "out": str(out),
        "scores": {name: report.to_dict() for name, report in scores.items()},
        "vector_use": use.to_dict(),
        "backbone_use": None if backbone is None else backbone.to_dict(),
        "training_tokens_per_second": speed,
        "continuations": continuations,
        "pictures": [str(path) for path in sorted(paths["plots"].glob("*.png"))],
        "seconds": seconds,
    }
    summary = _summary(
        scores,
        reports,
        findings,
        speed,
        continuations,
        paths,
        seconds,
    )
    write_whole(out / "report.txt", summary + "\n")
    write_whole(out / "report.json", json.dumps(result, indent=2) + "\n")
    return {**result, "summary": summary}


def _continue(model: bundle.Bundle, data: str, seed: int) -> list[dict[str, str]]:
    """Three validation documents' first 16 tokens, continued at T = 1/2."""
    valid = open_data(data).split("valid")
    starts = [int(start) for start in valid.documents[:3]] or [0]
    starts += [valid.num_tokens * i // 4 for i in range(1, 4 - len(starts))]  # few documents: from the middle of them
    prompts = [model.tokenizer.decode(valid.read(start, min(16, valid.num_tokens - start))) for start in starts]
    max_tokens = min(48, model.block_tokens - 24)  # a short context still holds the prompt and its first chunk
    texts = model.generate(prompts, max_tokens=max_tokens, temperature="1/2", candidates=200, seed=seed)["texts"]
    return [{"prompt": prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)]


def _training_speed(folder: Path) -> float:
    """The median tokens per second over a run's records."""
    rates = sorted(record["tokens_per_second"] for record in read_records(folder / "timing.jsonl"))
    return rates[len(rates) // 2] if rates else 0.0


def _summary(
    scores: dict[str, Any],
    reports: list[Any],
    findings: dict[str, str],
    speed: float,
    continuations: list[dict[str, str]],
    paths: dict[str, Path],
    seconds: float,
) -> str:
    autoencoder, lm = scores["autoencoder"], scores["lm"]
    lines = [
        f"autoencoder   {_percent(autoencoder.token_accuracy)} of held-out tokens are right after a round trip",
        f"BrierLM       {_value(lm.brier_lm)}, Kneser-Ney 5-gram {_value(scores['kn5'].brier_lm)}, "
        f"with a cache {_value(scores['kn5+cache'].brier_lm)}",
        *(f"{name:13} {finding}" for name, finding in findings.items()),
        f"speed         {speed:,.0f} tokens per second in training, {lm.tokens_per_second:,.0f} in evaluation",
        "",
        brier_table(reports),
        "",
    ]
    for entry in continuations:
        lines += [f"{entry['prompt']!r} ->", f"    {entry['continuation']!r}"]
    lines += [
        "",
        f"run folder    {paths['lm']}   (calm generate {paths['lm']} --prompt '...')",
        f"pictures      {', '.join(str(path) for path in sorted(paths['plots'].glob('*.png')))}",
        f"time          {seconds:.0f} s",
    ]
    return "\n".join(lines)


def _percent(interval: Interval) -> str:
    return f"{100 * float(interval.estimate):.2f} %"


def _value(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
