"""Matrix rate of this machine, by a short probe, and the precision that follows from it.

Matrix products are nearly all of the work here, so their rate is the yardstick of a run (progress shows the share of it that
the run reaches) and decides between the two precisions: bfloat16 operands with float32 accumulation where the processor has
units for them, float32 where it has not and bfloat16 would be slower.
"""

import functools
import time
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from calm.core.dense import PRECISIONS, Precision
from calm.errors import UsageError

SHAPES = ((512, 512, 512), (1024, 512, 2048), (2048, 256, 1024))
"""(rows, inner, columns) of the probed products: those of small models"""

ADVANTAGE = 1.15
"""bfloat16 is chosen where it is at least this much faster: less is within the noise of a probe and not worth its rounding"""


class MatrixRates(NamedTuple):
    """The best rate over the probed shapes, in FLOP/s, of one device."""

    float32: float
    bfloat16: float
    """operands in bfloat16, accumulation and result in float32"""

    def of(self, precision: str) -> float:
        return self.bfloat16 if precision == "bfloat16" else self.float32


def probe(shapes: tuple[tuple[int, int, int], ...] = SHAPES, seconds: float = 1.0) -> MatrixRates:
    """Measures both rates in about `seconds`, compilation included; the two take turns, so that a busy moment hits both."""
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    best = {"float32": 0.0, "bfloat16": 0.0}
    deadline = time.perf_counter() + seconds
    for index, (rows, inner, columns) in enumerate(shapes):
        until = deadline - seconds * (len(shapes) - 1 - index) / len(shapes)
        operands = {name: (jnp.ones((rows, inner), name), jnp.ones((inner, columns), name)) for name in best}
        for a, b in operands.values():
            product(a, b).block_until_ready()
        turns = 0
        while turns < 2 or (time.perf_counter() < until and turns < 30):
            turns += 1
            for name, (a, b) in operands.items():
                repeats = 4
                start = time.perf_counter()
                for _ in range(repeats - 1):
                    product(a, b)
                product(a, b).block_until_ready()
                rate = 2 * rows * inner * columns * repeats / (time.perf_counter() - start)
                best[name] = max(best[name], rate)
    return MatrixRates(**best)


@functools.cache
def machine_rates() -> MatrixRates:
    """Both rates by a probe, once in a process: a study trains dozens of models in one."""
    return probe()


def choose_precision(requested: str, rates: MatrixRates | None = None) -> Precision:
    """The precision asked for; "auto" takes the faster one on this machine, probed unless `rates` are known."""
    if requested in PRECISIONS:
        return cast(Precision, requested)
    if requested != "auto":
        raise UsageError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {requested!r}")
    rates = rates or machine_rates()
    return "bfloat16" if rates.bfloat16 >= ADVANTAGE * rates.float32 else "float32"


def devices() -> dict[str, object]:
    """The devices of this job, for meta.json."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
    }
