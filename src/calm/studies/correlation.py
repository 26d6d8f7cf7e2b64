"""Does BrierLM rank models as cross-entropy does? Many token models of known likelihood, scored by both.

A token model has a cross-entropy, so the two measures can be set side by side on the same held-out text: models of several
sizes, each trained on all of the text with weight decay and on a little of it without, so that some overfit, each scored at
several checkpoints. CALM (arXiv:2510.27688) reports a Pearson correlation of -0.966 over checkpoints of one kind; here it is
the rank correlation, with the overfitted ones shown apart, since a score that is proper but not the logarithm may rank them
otherwise.

    python -m calm.studies.correlation DATA OUT
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from calm.core.backbone import BackboneConfig
from calm.core.brier_lm import Protocol
from calm.errors import UsageError
from calm.evaluate.blocks import text_protocol
from calm.evaluate.brier import evaluate_predictor
from calm.evaluate.tables import table
from calm.rng import stream
from calm.text.atomic_write import write_whole
from calm.text.batches import evaluation_blocks
from calm.text.shards import Data, Split, open_data
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regime:
    """How a model is trained: on how much of the text, and with what weight decay."""

    name: str
    share: float
    weight_decay: float


REGIMES = (
    Regime(name="all, decay 0.1", share=1.0, weight_decay=0.1),
    Regime(name="2 %, no decay", share=0.02, weight_decay=0.0),
)
SIZES = (32, 64, 128, 192)
CHECKPOINTS = (50, 100, 200, 400)
ROWS, LENGTH, RATE = 8, 128, 3e-3


def run(
    data: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[int] = SIZES,
    regimes: Sequence[Regime] = REGIMES,
    checkpoints: Sequence[int] = CHECKPOINTS,
    max_tokens: int = 32 * 1024,
    num_samples: int = 8,
    boundary_every: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains and scores every model; writes `correlation.json` and `correlation.txt` into `out` and returns what they say.

    Args:
        sizes: model widths D. checkpoints: steps at which a model is scored. max_tokens: held-out text that is scored.

    Raises:
        UsageError: too little text, or nothing to correlate.
    """
    if min(len(sizes) * len(regimes) * len(checkpoints), *checkpoints, *sizes) < 1 or len(sizes) * len(checkpoints) < 2:
        raise UsageError("correlation: need at least two sizes or checkpoints, each at least 1")
    began, opened = time.perf_counter(), open_data(data)
    blocks, documents = evaluation_blocks(opened.split("valid"), num_tokens=LENGTH, max_blocks=max(1, max_tokens // LENGTH))
    text = text_protocol(opened, "valid", block_tokens=LENGTH, chunk_size=1, seed=seed)
    rows: list[dict[str, Any]] = []
    protocol = Protocol(**text.to_dict(), num_samples=num_samples, decoding="drawn", boundary_every=boundary_every)
    for dim in sizes:
        for regime in regimes:
            best = np.inf
            for step, model in _checkpoints(opened, dim, regime, sorted(checkpoints), seed):
                report = evaluate_predictor(
                    model,
                    blocks,
                    documents,
                    stream(jax.random.key(seed), "correlation"),
                    num_samples=num_samples,
                    boundary_every=boundary_every,
                    text=text,
                    name=f"D={dim}, {regime.name}, step {step}",
                )
                scores = report.scalars()
                best = min(best, scores["nats_per_token"])
                overfitted = scores["nats_per_token"] > best + 0.01
                rows.append({"dim": dim, "regime": regime.name, "step": step, "overfitted": overfitted, **scores})
                if not quiet:
                    print(f"{report.name}: {scores['nats_per_token']:.3f} nats, BrierLM {scores['brier_lm']:.3f}", flush=True)
    result = {
        "protocol": protocol.to_dict(),
        "checkpoints": rows,
        "spearman": correlations(rows),
        "spearman_without_overfitted": correlations([row for row in rows if not row["overfitted"]]),
        "seconds": time.perf_counter() - began,
    }
    lines = [_table(rows), "", protocol.line(), ""]
    for name in ("spearman", "spearman_without_overfitted"):
        values = ", ".join(f"{score} {value:.3f}" for score, value in result[name].items())
        lines.append(f"{name.replace('_', ' ')} rank correlation with -nats: {values}")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_whole(Path(out) / "correlation.json", json.dumps(result, indent=2) + "\n")
    write_whole(Path(out) / "correlation.txt", "\n".join(lines) + "\n")
    return result


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of each score with minus the nats per token: 1 = the same order."""
    likelihood = -np.array([row["nats_per_token"] for row in rows])
    names = ("brier_lm", "brier_1", "brier_2", "brier_3", "brier_4")
    return {name: spearman(np.array([row[name] for row in rows]), likelihood) for name in names}


def spearman(one: Float[np.ndarray, "X"], two: Float[np.ndarray, "X"]) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank. nan where one side is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]

    first, second = (ranks(values) - (len(values) + 1) / 2 for values in (one, two))
    scale = np.sqrt(np.sum(first**2) * np.sum(second**2))
    return float(np.sum(first * second) / scale) if scale else float("nan")


def _checkpoints(data: Data, dim: int, regime: Regime, steps: Sequence[int], seed: int) -> Iterator[tuple[int, Any]]:
    """Trains one model and hands it out at each of `steps`."""
    backbone = BackboneConfig(dim=dim, num_layers=2, num_heads=2, num_kv_heads=2, inner_dim=2 * dim)
    objective = TokenObjective(TokenLMConfig(vocab_size=data.tokenizer.vocab_size, backbone=backbone), context=LENGTH)
    params = objective.init(stream(jax.random.key(seed), "init"))
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, min(20, steps[-1]), steps[-1], RATE / 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=regime.weight_decay))
    moments = optimizer.init(params)

    @jax.jit
    def update(params: Any, moments: Any, tokens: Any) -> tuple[Any, Any]:
        gradient = jax.grad(lambda params: objective.loss(params, {}, tokens, jax.random.key(0))[0])(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    batches = _windows(data.split("train"), regime.share, seed)
    for step in range(1, steps[-1] + 1):
        params, moments = update(params, moments, next(batches))
        if step in steps:
            yield step, objective.module(params)


def _windows(split: Split, share: float, seed: int) -> Iterator[Int[np.ndarray, "B T"]]:
    """Random windows of the first `share` of a split."""
    generator, size = np.random.default_rng(seed), int(split.num_tokens * share)
    if size <= LENGTH:
        raise UsageError(f"data {split.folder}: {share:g} of the train split is {size} tokens, not one window of {LENGTH}")
    while True:
        starts = generator.integers(0, size - LENGTH, ROWS)
        yield np.stack([split.read(int(start), LENGTH) for start in starts])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["D", "regime", "step", "nats/token", "BrierLM", "Brier-1", "overfitted"]
    ordered = sorted(rows, key=lambda row: row["nats_per_token"])
    cells = [
        [
            str(row["dim"]),
            row["regime"],
            str(row["step"]),
            f"{row['nats_per_token']:.3f}",
            f"{row['brier_lm']:.3f}",
            f"{row['brier_1']:.3f}",
            "yes" if row["overfitted"] else "",
        ]
        for row in ordered
    ]
    return table(header, cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rank correlation of BrierLM with cross-entropy over token models.")
    parser.add_argument("data", help="folder of prepared data")
    parser.add_argument("out", help="folder for correlation.json and correlation.txt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(arguments.data, arguments.out, seed=arguments.seed)
    print((Path(arguments.out) / "correlation.txt").read_text())
