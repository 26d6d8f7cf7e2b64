"""Which places of a block are scored, and what a model with chunks of K tokens has read when it gets there.

A boundary at t has the tokens 0 .. t-1 of its block as context and is scored on the tokens t .. t+3. Boundaries lie at the
multiples of `every`, whatever the model, so that models of any K and n-gram models are scored at the same places with the same
context. A model of chunks gets to t in phase t mod K: its first chunk holds those t mod K tokens behind begin ids, as the first
chunk of a prompt does. `every` = 1 runs through all K phases, in which every token becomes a boundary.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Num

from calm.core.brier_lm import ORDERS
from calm.errors import UsageError


def boundaries(block_tokens: int, every: int) -> Int[np.ndarray, "A"]:
    """The multiples of `every` that have a token before them and ORDERS tokens behind them."""
    if every < 1:
        raise UsageError(f"boundary_every must be at least 1, got {every}")
    found = np.arange(every, block_tokens - ORDERS + 1, every)
    if not len(found):
        raise UsageError(
            f"blocks of {block_tokens} tokens hold no boundary: they need {every} tokens before and {ORDERS} behind"
        )
    return found


def targets_at(tokens: Num[np.ndarray, "B T"], places: Int[np.ndarray, "A"]) -> Num[np.ndarray, "B A O"]:
    """The tokens behind each boundary, or what stands in their places."""
    return tokens[:, places[:, None] + np.arange(ORDERS)]


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """One pass over blocks, in which a model has read `ends[a]` whole chunks at its a-th boundary.

    All phases of a model have arrays of one shape: a shorter phase repeats its last boundary with weight 0.
    """

    number: int
    chunk_size: int
    begins: int
    """begin ids in front of the block's first token"""
    places: Int[np.ndarray, "A"]
    """boundaries, in tokens of the block"""
    weight: Float[np.ndarray, "A"]
    length: int
    """chunks to read"""

    @property
    def ends(self) -> Int[np.ndarray, "A"]:
        return (self.places + self.begins) // self.chunk_size

    def chunks(self, tokens: Int[np.ndarray, "B T"], begin_id: int) -> Int[np.ndarray, "B N K"]:
        """What is read. Chunks behind the last boundary may lack tokens; nothing looks at them."""
        size = self.length * self.chunk_size
        rows = np.full((len(tokens), size), begin_id, np.int32)
        taken = min(tokens.shape[1], size - self.begins)
        rows[:, self.begins : self.begins + taken] = tokens[:, :taken]
        return rows.reshape(len(tokens), self.length, self.chunk_size)

    def next_chunks(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B A K"]:
        """The chunk behind each boundary."""
        return tokens[:, self.places[:, None] + np.arange(self.chunk_size)]


def phases_of(block_tokens: int, chunk_size: int, every: int) -> list[Phase]:
    """The passes in which a model of K tokens a chunk meets every boundary once. One pass where K divides `every`."""
    places = boundaries(block_tokens, every)
    shifts = np.unique(places % chunk_size)
    each = [places[places % chunk_size == shift] for shift in shifts]
    begins = [int(-shift % chunk_size) for shift in shifts]
    longest = max(map(len, each))
    length = max(int(part[-1] + begin) // chunk_size for part, begin in zip(each, begins, strict=True))
    return [
        Phase(
            number=number,
            chunk_size=chunk_size,
            begins=begin,
            places=np.pad(part, (0, longest - len(part)), mode="edge"),
            weight=(np.arange(longest) < len(part)).astype(np.float32),
            length=length,
        )
        for number, (part, begin) in enumerate(zip(each, begins, strict=True))
    ]
