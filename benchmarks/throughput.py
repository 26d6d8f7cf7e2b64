"""Tokens per second of training, evaluation and generation, beside the published PyTorch code and this machine's limit.

    python -m benchmarks.throughput [--json] [--size tiny|small] [--row NAME] [--seconds 10]

Every row runs in a process of its own, so that its peak memory is its own. Text is random tokens: nothing depends on what
they say. A row's rate is the median over repeated calls after a warm-up; `of rate` is its analytic FLOP/s over the best
matrix rate, measured by this program before the rows. Published figures were taken on two cores whose best bfloat16 rate was
1740 GFLOP/s; `vs published` compares after scaling them by this machine's best rate over that one.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PUBLISHED_RATE = 1740e9
ROWS = (
    "autoencoder step",
    "LM step",
    "LM step, auxiliary",
    "LM step, draws",
    "BrierLM",
    "T=1 B1",
    "T=1/2 B1",
    "T=1 B8",
    "T=1/2 B8",
)
PUBLISHED = {  # tokens per second of the published code in bfloat16, by size and row
    "tiny": dict(zip(ROWS, (14_100, 8_400, None, 8_400, 12_000, 820, 180, 5_400, 210), strict=True)),
    "small": dict(zip(ROWS, (10_700, 2_480, None, 2_480, 5_900, 285, 109, 1_970, 165), strict=True)),
}
VOCABULARY, BLOCK, CANDIDATES, NEW_TOKENS = 8192, 1024, 200, 256


@dataclasses.dataclass(frozen=True)
class Size:
    """What the two sizes are: width and Z of the autoencoder; width, layers, head blocks of the LM; rows of its batch."""

    width: int
    latent_dim: int
    dim: int
    inner_dim: int
    layers: int
    head_blocks: int
    rows: int


SIZES = {
    "tiny": Size(width=128, latent_dim=64, dim=256, inner_dim=688, layers=4, head_blocks=2, rows=4),
    "small": Size(width=256, latent_dim=128, dim=512, inner_dim=1376, layers=8, head_blocks=4, rows=2),
}


class Workload:
    """Models of one size, and each row as (call, tokens per call, FLOPs per token)."""

    def __init__(self, size: Size, precision: Any):
        from flax import nnx

        from calm.core.autoencoder import AutoencoderConfig
        from calm.core.backbone import BackboneConfig
        from calm.core.energy_head import EnergyHeadConfig
        from calm.core.latent_lm import LatentLMConfig

        heads = size.dim // 64
        self.size, self.precision = size, precision
        self.autoencoder_config = AutoencoderConfig(
            vocab_size=VOCABULARY, latent_dim=size.latent_dim, dim=size.width, inner_dim=5 * size.width // 2
        )
        self.lm_config = LatentLMConfig(
            vocab_size=VOCABULARY,
            chunk_size=4,
            latent_dim=size.latent_dim,
            backbone=BackboneConfig(
                dim=size.dim, num_layers=size.layers, num_heads=heads, num_kv_heads=heads, inner_dim=size.inner_dim
            ),
            head=EnergyHeadConfig(num_blocks=size.head_blocks),
        )
        self.autoencoder = self.autoencoder_config.build(rngs=nnx.Rngs(0), precision=precision)
        self.chunk_size, self.context = 4, BLOCK // 4
        self.decode_flops = self.autoencoder_config.decoder_flops() + self.autoencoder_config.vocabulary_flops()

    def build(self, row: str) -> tuple[Callable[[], Any], int, float]:
        """The row's work as a call that returns when it is done."""
        if row == "autoencoder step":
            return self._autoencoder_step()
        if row.startswith("LM step"):
            return self._lm_step(auxiliary="auxiliary" in row, draws="draws" in row)
        if row == "BrierLM":
            return self._brier_lm()
        temperature, batch = row.split()
        return self._generate(temperature.removeprefix("T="), int(batch.removeprefix("B")))

    def _tokens(self, rows: int) -> Any:
        import numpy as np

        return np.random.default_rng(0).integers(3, VOCABULARY, (rows, BLOCK), dtype=np.int32)

    def _step(self, objective: Any, rows: int) -> tuple[Callable[[], Any], int, float]:
        import jax

        from calm.train.mesh import MeshConfig
        from calm.train.optim import OptimizerConfig
        from calm.train.steps import StepConfig, TrainStep

        mesh = MeshConfig(data=1).build()
        config = StepConfig(total_steps=1000, batch_size=rows, num_tokens=BLOCK, optimizer=OptimizerConfig(), log_every=10)
        with jax.set_mesh(mesh):
            step = TrainStep(objective, config, mesh)
            leaves = step.init(jax.random.key(0))
        tokens = self._tokens(rows)

        def call() -> None:
            nonlocal leaves
            with jax.set_mesh(mesh):
                leaves = jax.block_until_ready(step(leaves, tokens))

        return call, rows * BLOCK, objective.flops_per_token()

    def _autoencoder_step(self) -> tuple[Callable[[], Any], int, float]:
        from calm.core.objective import AutoencoderLossConfig, AutoencoderObjective

        loss = AutoencoderLossConfig(random_chunks=0.0)
        objective = AutoencoderObjective(self.autoencoder_config, loss, mask_id=2, precision=self.precision)
        return self._step(objective, 4)

    def _lm_step(self, *, auxiliary: bool, draws: bool) -> tuple[Callable[[], Any], int, float]:
        from calm.core.objective import LatentLossConfig, LatentObjective

        loss = LatentLossConfig(
            num_samples=8,
            num_draws=100,
            auxiliary_weight=1.0 if auxiliary else 0.0,
            fidelity="draws" if draws else "second_order",
        )
        objective = LatentObjective(self.lm_config, loss, self.autoencoder, context=self.context, precision=self.precision)
        return self._step(objective, self.size.rows)

    def _lm(self) -> Any:
        from flax import nnx

        return self.lm_config.build(rngs=nnx.Rngs(1), precision=self.precision)

    def _brier_lm(self) -> tuple[Callable[[], Any], int, float]:
        import jax
        import numpy as np

        from calm.core.predictor import NextVector
        from calm.evaluate.brier import evaluate_predictor

        blocks, predictor, samples = self._tokens(16), NextVector(self.autoencoder, self._lm()), 8
        flops = (self.lm_config.flops(self.context, samples) + samples * self.decode_flops) / self.chunk_size

        def call() -> None:
            evaluate_predictor(predictor, blocks, np.arange(16), jax.random.key(0), num_samples=samples, with_energy=False)

        return call, blocks.size, flops

    def _generate(self, temperature: str, batch: int) -> tuple[Callable[[], Any], int, float]:
        import jax

        from calm.core import generate
        from calm.core.choose import from_temperature
        from calm.core.generate import SpecialIds
        from calm.core.predictor import NextVector
        from calm.rng import row_keys

        predictor, sampler = NextVector(self.autoencoder, self._lm()), from_temperature(temperature, CANDIDATES)
        prompts = list(self._tokens(batch)[:, :64])
        # random weights would end a text at any moment: an end id that is never written keeps the work the same
        special = SpecialIds(begin_id=0, end_id=VOCABULARY, mask_id=2)
        draws = getattr(sampler, "num_candidates", 1)
        flops = (self.lm_config.flops(self.context // 4, draws) + draws * self.decode_flops) / self.chunk_size

        def call() -> None:
            result = generate(
                predictor,
                prompts,
                row_keys(jax.random.key(0), batch),
                special=special,
                max_tokens=NEW_TOKENS,
                sampler=sampler,
            )
            assert result.tokens.shape == (batch, NEW_TOKENS)

        return call, batch * NEW_TOKENS, flops


def measure(row: str, size: str, seconds: float, precision: str) -> dict[str, Any]:
    """One row: the median rate over calls that fill `seconds` (at least 3), after two calls of warm-up."""
    call, tokens, flops = Workload(SIZES[size], precision).build(row)
    for _ in range(2):
        call()
    times, until = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    rate = tokens / statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"size": size, "row": row, "tokens_per_second": rate, "flops_per_second": rate * flops, "peak_bytes": peak}


def machine() -> dict[str, Any]:
    """The best rates of this machine, and the precision that training would choose."""
    from calm.train.matrix_rate import choose_precision, probe

    rates = probe(seconds=4.0)
    return {"float32": rates.float32, "bfloat16": rates.bfloat16, "precision": choose_precision("auto", rates)}


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: both")
    parser.add_argument("--row", choices=ROWS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of each row")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: the faster one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:  # the child process of one row
        print(json.dumps(measure(arguments.row[0], arguments.size[0], arguments.seconds, arguments.precision)))
        return

    limits = json.loads(_python("-c", "import json, benchmarks.throughput as b; print(json.dumps(b.machine()))"))
    precision = arguments.precision or limits["precision"]
    best, rows = max(limits["float32"], limits["bfloat16"]), []
    for size in arguments.size or SIZES:
        for row in arguments.row or ROWS:
            options = ["--one", "--size", size, "--row", row, "--seconds", str(arguments.seconds), "--precision", precision]
            result = json.loads(_python("-m", "benchmarks.throughput", *options))
            published = PUBLISHED[size][row]
            result["share_of_rate"] = result.pop("flops_per_second") / limits[precision]
            result["published_scaled"] = published and published * best / PUBLISHED_RATE
            result["vs_published"] = published and result["tokens_per_second"] / result["published_scaled"]
            rows.append(result)
            print(_line(result), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"machine": limits | {"precision": precision}, "rows": rows}))


def _python(*arguments: str) -> str:
    """The last line that a fresh Python prints."""
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


def _line(result: dict[str, Any]) -> str:
    ratio = result["vs_published"]
    return (
        f"{result['size']:6s} {result['row']:20s} {result['tokens_per_second']:10,.0f} tokens/s  "
        f"{100 * result['share_of_rate']:5.1f} % of rate  {result['peak_bytes'] / 2**20:6,.0f} MB  "
        f"{'' if ratio is None else f'{ratio:5.2f} x published'}"
    )


if __name__ == "__main__":
    main()
