"""Interface of all worlds.

A world reads text: its state is a function of the tokens read so far and gives the distribution Q of the next token. All else
follows by reading on. Ids are those of the word tokenizer that `calm data prepare --source world:NAME` writes: the words in
order, then begin, end and mask. The end id is a token of the language, which follows every document; begin and mask have
probability 0.

Contexts may start anywhere. `start` has read nothing and knows only the stationary distribution of the language, so a block
cut from the middle of a document gets the exact conditionals given the block.

Axis letters: B contexts, T tokens, V vocabulary, M states, n tokens of an n-gram, G n-grams, O orders 1..O, X any.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from calm.errors import UsageError

ORDERS = 4
MAX_TABLE = 2**22
"""entries of the largest table of n-grams"""
STREAM = 2**14
"""tokens of one stream, which are drawn one after the other"""

State = Num[np.ndarray, "B X"]
"""One row for each context: beliefs or memories, as the world needs them."""


class NgramTable(NamedTuple):
    """Every n-gram of a language with its probability after each context."""

    grams: Int[np.ndarray, "G n"]
    probability: Float[np.ndarray, "B G"]


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Finite Markov chain of a world's states after endless text: enough for averages over all contexts.

    Attributes:
      step: probability to go from state i to state j by one token.
      squares: sum of the squared probabilities of the tokens that go from i to j.
      entropy: entropy of the next token in each state, in nats.
    """

    step: Float[np.ndarray, "M M"]
    squares: Float[np.ndarray, "M M"]
    entropy: Float[np.ndarray, "M"]

    @functools.cached_property
    def stationary(self) -> Float[np.ndarray, "M"]:
        """Stationary distribution pi: pi step = pi, sum 1. Unique, since every world returns to the start of a document."""
        equations = self.step.T - np.eye(len(self.step))
        equations[-1] = 1  # any one of the others follows from the rest
        solution = np.linalg.solve(equations, np.eye(len(self.step))[-1])
        return np.maximum(solution, 0) / np.maximum(solution, 0).sum()

    @property
    def entropy_rate(self) -> float:
        """Entropy of the next token in nats, averaged over endless text."""
        return float(self.stationary @ self.entropy)

    def ceilings(self, orders: int = ORDERS) -> Float[np.ndarray, "O"]:
        """Average of sum Q^2 over the next n-grams, n = 1..O, by s_n = squares s_{n-1}, s_0 = 1."""
        values, current = [], np.ones(len(self.step))
        for _ in range(orders):
            current = self.squares @ current
            values.append(self.stationary @ current)
        return np.array(values)


class World(abc.ABC):
    """A language whose next-token distribution is known exactly after every context.

    Subclasses define `name`, `words`, `start`, `distribution`, `read` and `chain`.
    """

    name: str
    words: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of ids: the words, and begin, end and mask."""
        return len(self.words) + 3

    @property
    def begin_id(self) -> int:
        """Id that fills the front of a prompt; of probability 0."""
        return len(self.words)

    @property
    def end_id(self) -> int:
        """Id that follows every document."""
        return len(self.words) + 1

    @property
    def mask_id(self) -> int:
        """Id of a masked token; of probability 0."""
        return len(self.words) + 2

    @property
    def support(self) -> Int[np.ndarray, "X"]:
        """Ids that text of this world consists of, ascending."""
        return np.append(np.arange(len(self.words)), self.end_id)

    # -- required interface -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def start(self, batch: int) -> State:
        """State of `batch` contexts of which nothing was read."""

    @abc.abstractmethod
    def distribution(self, state: State) -> Float[np.ndarray, "B V"]:
        """Probabilities Q of the next token."""

    @abc.abstractmethod
    def read(self, state: State, tokens: Int[np.ndarray, "B"]) -> State:
        """State after one more token; undefined after a token of probability 0."""

    @abc.abstractmethod
    def chain(self) -> Chain:
        """Finite chain of the states, from which entropy rate and ceilings come."""

    # -- derived from it ----------------------------------------------------------------------------------------------

    @property
    def entropy_rate(self) -> float:
        """Entropy of endless text in nats per token, exact."""
        return self.chain().entropy_rate

    def ceilings(self) -> Float[np.ndarray, "4"]:
        """Expected Brier-1..4 of the language itself (sum Q^2), given all that came before: the most that a model can reach."""
        return self.chain().ceilings()

    def condition(self, context: Int[np.ndarray, "B T"]) -> State:
        """State after each context."""
        state = self.start(len(context))
        for column in np.asarray(context).T:
            state = self.read(state, column)
        return state

    def probability(self, context: Int[np.ndarray, "B T"], grams: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        """Probability of the first k tokens of each n-gram after its context, k = 1..n."""
        return self._along(self.condition(context), grams)

    def _along(self, state: State, grams: Int[np.ndarray, "B n"]) -> Float[np.ndarray, "B n"]:
        steps = []
        for column in np.asarray(grams).T:
            steps.append(self.distribution(state)[np.arange(len(column)), column])
            state = self.read(state, column)
        return np.cumprod(np.stack(steps, -1), axis=-1)

    def table(self, context: Int[np.ndarray, "B T"], n: int) -> NgramTable:
        """Every n-gram with its probability after each context, for n in 1..4.

        Raises UsageError: the table would have more than `MAX_TABLE` entries.
        """
        if not 1 <= n <= ORDERS:
            raise UsageError(f"n: n-grams of 1 to {ORDERS} tokens, got {n}")
        rows, choices = len(context), len(self.support)
        if rows * choices**n > MAX_TABLE:
            raise UsageError(
                f"n: a table of {rows} x {choices}^{n} n-grams is larger than {MAX_TABLE}; ask for `probability` of given ones"
            )
        state, probability = self.condition(context), np.ones((rows, 1))
        for _ in range(n):  # row-major: the last token varies fastest
            probability = (probability.reshape(-1, 1) * self.distribution(state)[:, self.support]).reshape(rows, -1)
            state = self.read(np.repeat(state, choices, axis=0), np.tile(self.support, len(state)))
        return NgramTable(np.array(list(itertools.product(self.support, repeat=n))), probability)

    def self_match(self, state: State, orders: int = ORDERS) -> Float[np.ndarray, "B O"]:
        """Sum of Q^2 over the next n-grams, n = 1..O: the average Brier-n of the language itself after each context.

        Reads on with every token that may come; worlds with a closed form override it.
        """
        probability = self.distribution(state)
        rows, tokens = np.nonzero(probability)
        squares = probability[rows, tokens] ** 2
        sums = [np.bincount(rows, weights=squares, minlength=len(state))]
        if orders > 1:
            later = self.self_match(self.read(state[rows], tokens), orders - 1)
            sums += [np.bincount(rows, weights=squares * column, minlength=len(state)) for column in later.T]
        return np.stack(sums, -1)

    def sample(self, tokens: int, *, seed: int | Sequence[int], streams: int = 1) -> Int[np.ndarray, "streams T"]:
        """Draws `streams` independent texts of `tokens` tokens, each from the start of a document."""
        columns = self._columns(streams, np.random.default_rng(seed))
        return np.stack(list(itertools.islice(columns, tokens)), -1)

    def documents(self, tokens: int, *, seed: int | Sequence[int]) -> Iterator[Int[np.ndarray, "_"]]:
        """Draws whole documents, without their ends, until there are at least `tokens` tokens, ends counted."""
        streams = max(1, tokens // STREAM)  # side by side, which is faster; a few long texts rather than many short ones
        columns, ended = [], np.zeros(streams, bool)
        for column in self._columns(streams, np.random.default_rng(seed)):
            columns.append(column)
            ended |= (len(columns) * streams >= tokens) & (column == self.end_id)
            if ended.all():
                break
        for row in np.stack(columns, -1):
            ends = np.flatnonzero(row == self.end_id)
            complete = ends[: 1 + np.searchsorted((1 + ends) * streams, tokens)]
            yield from (part[part != self.end_id] for part in np.split(row[: complete[-1] + 1], complete[:-1] + 1))

    def _columns(self, streams: int, generator: np.random.Generator) -> Iterator[Int[np.ndarray, "streams"]]:
        """Draws the next token of each stream, without end."""
        state = self.at_document(streams)
        while True:
            cumulative = np.cumsum(self.distribution(state), axis=-1)
            tokens = (generator.random((streams, 1)) * cumulative[:, -1:] >= cumulative).sum(-1)
            yield tokens
            state = self.read(state, tokens)

    def at_document(self, batch: int) -> State:
        """State at the start of a document, where an end was read."""
        return self.read(self.start(batch), np.full(batch, self.end_id))


def tempered(probability: Float[np.ndarray, "*b G"], temperature: float | int) -> Float[np.ndarray, "*b G"]:
    """Target P^(1/T) / Z of a sampler at temperature T, over the last axis; each n-gram is one outcome.

    Raises UsageError: T is not above 0.
    """
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    scaled = probability / probability.max(-1, keepdims=True)
    powers = scaled ** (1 / temperature)
    return powers / powers.sum(-1, keepdims=True)
