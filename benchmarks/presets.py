"""A training step of a preset's language model, in tokens per second and as a share of this machine's matrix rate.

    python -m benchmarks.presets wikitext2-tiny wikitext2-tiny-hybrid             # the table of docs/backbones.md
    python -m benchmarks.presets hybrid-107m hybrid-97m --token --rows 1           # as token models, one row a step

Text is random tokens: nothing depends on what they say, and no data has to be prepared. Model, loss and length of a row are the
preset's, its batch too unless `--rows` says otherwise; the autoencoder behind a latent model is untrained. A rate is the median
over repeated steps after a warm-up; the share is of the best product of this machine at the precision that is used.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from typing import Any

WORDS = 267_735
"""entries of WikiText-103's vocabulary, which the presets at word level are sized for"""


def vocabulary(tokenizer: str) -> int:
    """Entries of the tokenizer that a preset is meant for.

    Raises:
        UsageError: it is a file, whose size the preset does not say.
    """
    from calm.errors import UsageError

    if tokenizer == "words":
        return WORDS
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe":
        raise UsageError(f"a preset for the tokenizer {tokenizer!r} says no size of a vocabulary, so its step cannot be built")
    return int(size)


def objective_of(name: str, token: bool, precision: Any) -> tuple[Any, Any]:
    """What a preset's language model is trained by, and the run's training settings."""
    from flax import nnx

    from calm.core.objective import LatentObjective
    from calm.runs import presets
    from calm.token.objective import TokenObjective

    preset = presets.get(name)
    size, run = vocabulary(preset.tokenizer), preset.token_lm if token else preset.lm
    if token:
        model = dataclasses.replace(run.model, vocab_size=size)
        return TokenObjective(model, run.loss, context=run.train.num_tokens, precision=precision), run.train
    codec = dataclasses.replace(preset.autoencoder.model, vocab_size=size)
    autoencoder = nnx.jit(lambda: codec.build(rngs=nnx.Rngs(0), precision=precision))()
    sizes = dict(vocab_size=size, chunk_size=codec.chunk_size, latent_dim=codec.latent_dim)
    context = run.train.num_tokens // codec.chunk_size
    model = dataclasses.replace(run.model, **sizes)
    return LatentObjective(model, run.loss, autoencoder, context=context, precision=precision), run.train


def measure(name: str, token: bool, rows: int, seconds: float, precision: str) -> tuple[int, float, float]:
    """Weights, tokens per second and FLOP/s of a step."""
    import jax
    import numpy as np

    from calm.train.mesh import MeshConfig
    from calm.train.steps import TrainStep

    objective, train = objective_of(name, token, precision)
    rows, mesh = rows or train.batch_size, MeshConfig(data=1).build()
    with jax.set_mesh(mesh):
        step = TrainStep(objective, dataclasses.replace(train, batch_size=rows).step_config(), mesh)
        leaves = step.init(jax.random.key(0))
        tokens = np.random.default_rng(0).integers(3, objective.model.vocab_size, (rows, train.num_tokens), dtype=np.int32)
        times, until = [], 0.0
        while len(times) < 5 or time.perf_counter() < until:
            began = time.perf_counter()
            leaves = jax.block_until_ready(step(leaves, tokens))
            times.append(time.perf_counter() - began)
            until = until or time.perf_counter() + seconds
    rate = tokens.size / statistics.median(times[2:])
    return objective.model.parameters(), rate, rate * objective.flops_per_token()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--token", action="store_true", help="the preset's token model, in place of its latent one")
    parser.add_argument("--rows", type=int, default=0, help="rows of a step; default: the preset's batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of each preset")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from calm.errors import CalmError

    try:
        return one(options) if options.one else each(options)
    except CalmError as error:
        parser.error(str(error))


def each(options: argparse.Namespace) -> None:
    """Each preset in a process of its own, the machine's rate measured right before it; the first that fails ends it."""
    for name in options.presets:
        words = ["--one", "--rows", str(options.rows), "--seconds", str(options.seconds), *["--token"] * options.token]
        code = subprocess.run([sys.executable, "-m", "benchmarks.presets", name, *words]).returncode
        if code:
            sys.exit(code)


def one(options: argparse.Namespace) -> None:
    """Measures and prints."""

    from calm.train.matrix_rate import choose_precision, probe

    rates = probe(seconds=4.0)
    precision = choose_precision("auto", rates)
    name = options.presets[0]
    weights, tokens, flops = measure(name, options.token, options.rows, options.seconds, precision)
    print(
        f"{name:24s} {weights / 1e6:6.1f} M weights  {tokens:10,.0f} tokens/s  {flops / 1e9:6.0f} GFLOP/s  "
        f"{100 * flops / rates.of(precision):4.0f} % of the rate in {precision}",
        flush=True,
    )


if __name__ == "__main__":
    main()
