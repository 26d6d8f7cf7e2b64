"""Measures the frontier of accuracy and collision (`calm.evaluate.sampling_frontier`) of a model on held-out blocks."""

import dataclasses
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.predictor import DECODINGS, Predictor, sample_chunks
from calm.core.temperature import BatchTemperature, exact_temperature
from calm.decoders.context_decoder import recent_tokens
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.frontier_report import FrontierReport
from calm.evaluate.sampling_frontier import frontier
from calm.rng import PRNGKey, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """What is swept, and on how many positions."""

    temperatures: tuple[str, ...] = ("1", "0.7", "1/2", "1/3", "1/4", "1/8")
    """T, each above 0"""
    sizes: tuple[int, ...] = (10, 50, 200)
    """S, candidates of the batch sampler"""
    positions: int = 32
    """chunks of every block that are predicted, evenly spread over it"""
    decoding: str = "argmax"

    def __post_init__(self) -> None:
        if not self.temperatures or not self.sizes or self.positions < 1:
            raise UsageError("frontier: needs at least one temperature, one number of candidates and one position")
        if self.decoding not in DECODINGS:
            raise UsageError(f"unknown decoding {self.decoding!r}; choose {' or '.join(DECODINGS)}")
        for temperature in self.fractions:  # each pair must be a sampler
            BatchTemperature(temperature=temperature, num_candidates=min(self.sizes))

    @property
    def fractions(self) -> tuple[Fraction, ...]:
        return tuple(exact_temperature(temperature) for temperature in self.temperatures)


@partial(jax.jit, static_argnames=("graph", "options"))
def _score(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey, *, options: FrontierOptions
) -> Float[Array, "B F"]:
    """Sums over the positions of every block."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    places = np.unique(np.linspace(0, targets.shape[1] - 1, options.positions).astype(int))
    most = max(options.sizes)

    def position(each: tuple[Array, ...]) -> Float[Array, "F"]:
        row, place, hidden, previous, truth = each
        of_position = jax.random.fold_in(jax.random.fold_in(key, row), place)
        draws = sample_chunks(predictor, of_position, hidden[None], previous[None], 2 * most, decoding=options.decoding)
        return frontier(draws.reshape(2, most, -1), truth, options.fractions, options.sizes).reshape(-1)

    shape = (len(tokens), len(places))
    of_each = (
        jnp.broadcast_to(rows[:, None], shape),
        jnp.broadcast_to(jnp.asarray(places), shape),
        *(x[:, places] for x in (hidden, previous, targets)),
    )
    scores = jax.lax.map(position, jax.tree.map(lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:]), of_each))
    return scores.reshape(*shape, -1).sum(1)


def measure_frontier(
    predictor: Predictor,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    options: FrontierOptions | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> FrontierReport:
    """Draws twice the largest number of candidates at some positions of every block, after the true text before them.

    All temperatures and numbers of candidates share these draws, so their differences are less noisy than each of them.

    Raises:
        UsageError: blocks that do not fit the model.
    """
    options = options or FrontierOptions()
    text = checked(blocks, document, predictor.chunk_size, text)
    graph, params = nnx.split(predictor)
    key = stream(key, "frontier")
    totals, _ = run_blocks(lambda tokens, rows: _score(graph, params, tokens, rows, key, options=options), blocks, None)
    places = min(options.positions, blocks.shape[1] // predictor.chunk_size - 1)
    return FrontierReport(
        name=name,
        protocol=text,
        temperatures=options.temperatures,
        sizes=options.sizes,
        scores=sums_of(totals, places, document, blocks.shape[1]),
        decoding=options.decoding,
    )
