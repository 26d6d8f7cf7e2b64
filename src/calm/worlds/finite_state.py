"""Worlds of finitely many states in which a state and a token decide the next state.

The state of a context is a belief: the probability of each state of the language given the tokens read. It is certain from the
first token on in a Markov chain, from the first document start on in any of them.

Axis letters as in `calm.worlds.world`: B contexts, V vocabulary, M states, O orders.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from calm.errors import UsageError
from calm.worlds.world import ORDERS, Chain, State, World

MAX_STATES = 4096


class FiniteStateWorld(World):
    """A language in which the state decides the distribution of the next token, and the token the next state.

    Args:
      table: probability of each token in each state.
      following: state after each token in each state.

    Raises UsageError: rows that are no distributions, or more than `MAX_STATES` states.
    """

    def __init__(self, name: str, words: tuple[str, ...], table: Float[np.ndarray, "M V"], following: Int[np.ndarray, "M V"]):
        self.name, self.words = name, words
        self.table_of_states, self.following = table, following
        if table.shape != (len(following), self.vocab_size) or not np.allclose(table.sum(-1), 1):
            raise UsageError(f"world {name}: every state needs a distribution over {self.vocab_size} tokens")
        if len(table) > MAX_STATES:
            raise UsageError(f"world {name}: {len(table)} states, more than {MAX_STATES}; choose smaller parameters")

    @property
    def num_states(self) -> int:
        """Number of states M."""
        return len(self.table_of_states)

    def start(self, batch: int) -> State:
        return np.broadcast_to(self._chain.stationary, (batch, self.num_states)).copy()

    def distribution(self, state: State) -> Float[np.ndarray, "B V"]:
        return state @ self.table_of_states

    def read(self, state: State, tokens: Int[np.ndarray, "B"]) -> State:
        belief, certain = np.zeros_like(state), state.argmax(-1)
        everyone = np.arange(len(tokens))
        if (state[everyone, certain] == 1).all():
            belief[everyone, self.following[certain, tokens]] = 1
            return belief
        weights = state * self.table_of_states[:, tokens].T
        rows, before = np.nonzero(weights)
        np.add.at(belief, (rows, self.following[before, tokens[rows]]), weights[rows, before])
        total = belief.sum(-1, keepdims=True)
        return np.divide(belief, total, out=np.zeros_like(belief), where=total > 0)

    def chain(self) -> Chain:
        return self._chain

    def _columns(self, streams: int, generator: np.random.Generator) -> Iterator[Int[np.ndarray, "streams"]]:
        cumulative = np.cumsum(self.table_of_states, axis=-1)
        state = self.at_document(streams).argmax(-1)
        while True:
            bounds = cumulative[state]
            tokens = (generator.random((streams, 1)) * bounds[:, -1:] >= bounds).sum(-1)
            yield tokens
            state = self.following[state, tokens]

    def self_match(self, state: State, orders: int = ORDERS) -> Float[np.ndarray, "B O"]:
        """Sum of Q^2 as b' W_n b for a belief b, with W_n[i, j] = sum over n-grams of P(gram | i) P(gram | j)."""
        return np.stack([np.einsum("bi,ij,bj->b", state, pairs, state) for pairs in self._pairs[:orders]], -1)

    @functools.cached_property
    def _chain(self) -> Chain:
        size, table = self.num_states, self.table_of_states
        step, squares = np.zeros((size, size)), np.zeros((size, size))
        rows = np.broadcast_to(np.arange(size)[:, None], table.shape)
        np.add.at(step, (rows, self.following), table)
        np.add.at(squares, (rows, self.following), table**2)
        return Chain(step, squares, -np.sum(table * np.log(np.where(table > 0, table, 1)), axis=-1))

    @functools.cached_property
    def _pairs(self) -> list[Float[np.ndarray, "M M"]]:
        pairs, every = np.ones((self.num_states, self.num_states)), []
        for _ in range(ORDERS):
            grown = np.zeros_like(pairs)
            for token in self.support:
                chance, after = self.table_of_states[:, token], self.following[:, token]
                here = np.flatnonzero(chance)
                grown[np.ix_(here, here)] += np.outer(chance[here], chance[here]) * pairs[np.ix_(after[here], after[here])]
            pairs = grown
            every.append(pairs)
        return every


class MarkovWorld(FiniteStateWorld):
    """A Markov chain over tokens: the state is the last token.

    Each row of the transition matrix is a draw from a Dirichlet distribution, so some words follow often and most hardly ever.

    Args:
      words: number of words.
      concentration: of the Dirichlet distribution; small values make text predictable.
      document: average number of tokens of a document, its end included; there is at least one word.
      seed: of the transition matrix.
    """

    def __init__(self, *, words: int = 64, concentration: float = 0.1, document: int = 256, seed: int = 0):
        if not 2 <= words < MAX_STATES or not 0 < concentration <= 1e6 or document < 3 or seed < 0:
            raise UsageError(
                f"world markov: need 2 <= words < {MAX_STATES}, 0 < concentration <= 1e6, document >= 3 and seed >= 0, got "
                f"words={words}, concentration={concentration:g}, document={document}, seed={seed}"
            )
        generator = np.random.default_rng(seed)
        rows = generator.dirichlet(np.full(words, concentration), size=words + 1) + 1e-6 / words
        rows /= rows.sum(-1, keepdims=True)
        vocabulary = words + 3
        table = np.zeros((words + 1, vocabulary))
        table[:, :words], end = rows, words + 1
        table[:words] *= 1 - 1 / (document - 1)
        table[:words, end] = 1 / (document - 1)
        # States 0 .. words - 1 are the last word; state `words` follows an end.
        following = np.broadcast_to(np.minimum(np.arange(vocabulary), words), table.shape)
        super().__init__("markov", tuple(f"w{number}" for number in range(words)), table, following)
