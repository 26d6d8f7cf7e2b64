"""Samplers on laws that are known: bias by enumeration, cost by closed form; and what choosing costs beside decoding.

    python -m benchmarks.samplers [--json] [--rows 8] [--candidates 200]

Three tables: the total variation of the batch sampler's exact law to its target, and its share of fallbacks, at
P = (.4, .3, .2, .1); the average draws of the exact sampler; and the time of one step's parts on this machine, for a head and a
decoder of the size of the `tiny` preset, V = 8192.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

LAW = np.array([0.4, 0.3, 0.2, 0.1])
TEMPERATURES = tuple(Fraction(t) for t in ("1/4", "1/3", "2/5", "1/2", "3/5", "7/10", "4/5", "9/10", "1", "3/2", "2", "5"))
SIZES = (10, 50, 200)


def bias() -> list[dict[str, Any]]:
    """Total variation and share of fallbacks for each temperature and number of candidates."""
    from calm.core.laws import batch_law, target, total_variation

    rows = []
    for temperature in TEMPERATURES:
        row: dict[str, Any] = {"T": str(temperature)}
        for size in SIZES:
            found = batch_law(LAW, temperature, size)
            row[f"S={size}"] = total_variation(found.law, target(LAW, temperature))
            row[f"fallback S={size}"] = found.fallback_share
        rows.append(row)
    return rows


def costs() -> list[dict[str, Any]]:
    """Average draws of the exact sampler on three laws."""
    from calm.core.laws import expected_draws

    zipf = {size: 1 / np.arange(1, size + 1) for size in (100, 100_000)}
    laws = {"(.4 .3 .2 .1)": LAW} | {f"Zipf, {size} chunks": law / law.sum() for size, law in zipf.items()}
    return [
        {"T": str(temperature)} | {name: expected_draws(law, temperature) for name, law in laws.items()}
        for temperature in (*TEMPERATURES[:9], Fraction(99, 100))
        if temperature <= 1
    ]


def times(rows: int, candidates: int) -> list[dict[str, Any]]:
    """Milliseconds of drawing and of choosing, for all rows together."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from calm.core.autoencoder import AutoencoderConfig
    from calm.core.backbone import BackboneConfig
    from calm.core.counts import BestOfN, Filters
    from calm.core.decoder import ScoringTable
    from calm.core.energy_head import EnergyHeadConfig
    from calm.core.exact import ExactTemperature
    from calm.core.latent_lm import LatentLMConfig
    from calm.core.predictor import NextVector
    from calm.core.sampler import StepKeys
    from calm.core.steps import ModelSource
    from calm.core.temperature import BatchTemperature
    from calm.text.chunking import NOTHING
    from calm.train.matrix_rate import choose_precision

    precision = choose_precision("auto")
    codec = AutoencoderConfig(vocab_size=8192, chunk_size=4, latent_dim=64, dim=128, inner_dim=320)
    backbone = BackboneConfig(dim=256, num_layers=1, num_heads=4, num_kv_heads=4, inner_dim=688)
    lm = LatentLMConfig(vocab_size=8192, chunk_size=4, latent_dim=64, backbone=backbone, head=EnergyHeadConfig())
    predictor = NextVector(codec.build(rngs=nnx.Rngs(0), precision=precision), lm.build(rngs=nnx.Rngs(1), precision=precision))
    graph, params = nnx.split(predictor)
    keys = StepKeys(*jax.random.split(jax.random.key(0), (2, rows)))
    hidden = jax.random.normal(jax.random.key(1), (rows, 256))
    history = jnp.full((rows, 1024), NOTHING).at[:, 512:].set(jax.random.randint(jax.random.key(2), (rows, 512), 0, 8192))

    def source(params: Any) -> ModelSource:
        model = nnx.merge(graph, params)
        table = ScoringTable.of(model.table, precision)
        previous, alive = jnp.zeros((rows, 0), jnp.int32), jnp.ones((rows,), bool)
        return ModelSource(model, table, "argmax", hidden, previous, history, alive)

    class Drawn:
        """Candidates that are there already: few different ones, as a trained model has."""

        alive = jnp.ones((rows,), bool)

        def __init__(self, chunks: Any):
            self.chunks = chunks

        def draw(self, keys: Any, num_draws: int) -> Any:
            return self.chunks[:num_draws]

        def repeats(self, chunks: Any, length: int) -> Any:
            from calm.core.repetition import repeats

            return repeats(history, chunks, length)

    chunks = jax.random.randint(jax.random.key(3), (candidates, rows, 1), 0, 40) + jnp.arange(4)
    half = BatchTemperature(num_candidates=candidates)
    samplers = {
        "batch, T=1/2": half,
        "batch, T=.7": BatchTemperature(temperature=Fraction(7, 10), num_candidates=candidates),
        "batch, T=1/2, top-k, top-p, min-p": BatchTemperature(
            num_candidates=candidates, filters=Filters(top_k=50, top_p=0.9, min_p=0.05)
        ),
        "best": BestOfN(num_candidates=candidates),
        "batch, T=1/2, no 4 tokens twice": BatchTemperature(num_candidates=candidates, no_repeat=4),
        "exact, T=1/2, reading one block of 64": ExactTemperature(block=64, max_draws=64),
    }
    draw = jax.jit(lambda params, keys: source(params).draw(keys.draw, candidates))
    found = [{"part": f"draw and decode {candidates} chunks", "ms": milliseconds(lambda: draw(params, keys))}]
    for name, sampler in samplers.items():
        choose = jax.jit(lambda keys, chunks, sampler=sampler: sampler.sample(keys, Drawn(chunks)))
        found.append({"part": f"choose: {name}", "ms": milliseconds(lambda choose=choose: choose(keys, chunks))})
    return found


def milliseconds(call: Callable[[], Any], seconds: float = 2.0) -> float:
    """The median over repeated calls, after two that compile and warm up."""
    import jax

    for _ in range(2):
        jax.block_until_ready(call())
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=200)
    arguments = parser.parse_args()
    tables = {"bias": bias(), "draws": costs(), "times": times(arguments.rows, arguments.candidates)}
    if arguments.json:
        print(json.dumps(tables))
        return
    for name, rows in tables.items():
        print(f"\n{name}")
        for row in (dict(zip(rows[0], rows[0], strict=True)), *rows):
            first, *rest = (value if isinstance(value, str) else f"{value:.4g}" for value in row.values())
            print(f"{first:<38}" + "".join(f"{value:>22}" for value in rest))


if __name__ == "__main__":
    main()
