"""A world in which the answer lies far back: settings of keys, and queries that must be answered with the last value.

    k3 is v7 k12 ? v0 k3 ? v7 ...

A statement is a key, then `is` or `?`, then a value. After `is` any value may come; after `?` comes the last value given to the
key in this document, or any, if the key was not mentioned. With n keys the answer is about 3 n tokens back, where no n-gram
model sees it. The task is that of associative recall (Arora et al. 2023, arXiv:2312.04927), as a language.

Axis letters as in `calm.worlds.world`: B contexts, V vocabulary, M lumped states, O orders, R some of the contexts.
"""

import functools

import numpy as np
from jaxtyping import Float, Int

from calm.errors import UsageError
from calm.worlds.world import ORDERS, Chain, State, World

FRESH, KEY, VERB, VALUE, NOTHING_READ = range(5)
_PHASE, _KEY, _ASKED, _ORPHAN, _FIRST = range(5)
_ROWS = 64  # contexts at a time where every continuation is read


class KeyValueWorld(World):
    """Statements about keys, which come uniformly.

    The state of a context holds the kind of token that comes next; the present key, -1 if the text began after it, and whether
    it is queried; each key's value, -1 if not known. A text that begins inside a statement shows a value whose key is not seen,
    an orphan: then each key has a weight, the probability that the orphan is its value and the key was not mentioned since.

    Args:
      keys: number of keys, 2 to 1024.
      values: number of values, 2 to 65,536.
      settings: share of the statements that set a value; the others are queries.
      statements: average number of statements of a document.
    """

    name = "key-value"

    def __init__(self, *, keys: int = 16, values: int = 16, settings: float = 0.3, statements: int = 84):
        if not (2 <= keys <= 1024 and 2 <= values <= 65_536) or not 0 < settings < 1 or statements < 2:
            raise UsageError(
                f"world key-value: need 2 <= keys <= 1024, 2 <= values <= 65536, 0 < settings < 1 and statements >= 2, got "
                f"keys={keys}, values={values}, settings={settings:g}, statements={statements}"
            )
        self.keys, self.values, self.settings, self.ending = keys, values, settings, 1 / statements
        names = [f"k{number}" for number in range(keys)] + ["is", "?"] + [f"v{number}" for number in range(values)]
        self.words = tuple(names)
        self._is, self._ask, self._first_value = keys, keys + 1, keys + 2

    def start(self, batch: int) -> State:
        state = np.full((batch, _FIRST + 2 * self.keys), -1.0)
        state[:, _PHASE], state[:, _ASKED], state[:, _FIRST : _FIRST + self.keys] = NOTHING_READ, 0, 0
        return state

    def distribution(self, state: State) -> Float[np.ndarray, "B V"]:
        found, phase = np.zeros((len(state), self.vocab_size)), state[:, _PHASE]
        values = slice(self._first_value, self._first_value + self.values)
        share = np.zeros((len(state), 4))  # of each kind of token; a single one, except where nothing was read
        share[phase < NOTHING_READ] = np.eye(4)[phase[phase < NOTHING_READ].astype(int)]
        share[phase == NOTHING_READ] = self._phases
        fresh, key, verb, value = share.T[..., None]
        found[:, : self.keys] = (fresh + key * (1 - self.ending)) / self.keys
        found[:, self.end_id] = key[:, 0] * self.ending
        found[:, self._is], found[:, self._ask] = verb[:, 0] * self.settings, verb[:, 0] * (1 - self.settings)
        found[:, values] = value * self._answers(state)
        return found

    def _answers(self, state: State) -> Float[np.ndarray, "B values"]:
        """Distribution of the value, if one is next."""
        found = np.full((len(state), self.values), 1 / self.values)
        asked = np.flatnonzero((state[:, _PHASE] == VALUE) & (state[:, _ASKED] == 1) & (state[:, _KEY] >= 0))
        key = state[asked, _KEY].astype(int)
        weight, memory = state[asked, _FIRST + key], state[asked, _FIRST + self.keys + key].astype(int)
        known = memory >= 0
        found[asked[known]] = np.eye(self.values)[memory[known]]
        found[asked[~known]] *= 1 - weight[~known, None]
        orphan = state[asked, _ORPHAN].astype(int)
        maybe = ~known & (orphan >= 0)
        found[asked[maybe], orphan[maybe]] += weight[maybe]
        return found

    def read(self, state: State, tokens: Int[np.ndarray, "B"]) -> State:
        state, tokens = state.copy(), np.asarray(tokens)
        borders = [self.keys, self._first_value, self._first_value + self.values]
        kind = np.searchsorted(borders, tokens, side="right")
        key, verb, value = (np.flatnonzero(kind == number) for number in range(3))
        self._read_value(state, value, tokens[value] - self._first_value)
        state[key, _PHASE], state[key, _KEY] = VERB, tokens[key]
        state[verb, _PHASE], state[verb, _ASKED] = VALUE, tokens[verb] == self._ask
        state[value, _PHASE] = KEY
        end = tokens == self.end_id
        state[end] = self.start(int(end.sum()))
        state[end, _PHASE] = FRESH
        return state

    def _read_value(self, state: State, rows: Int[np.ndarray, "R"], values: Int[np.ndarray, "R"]) -> None:
        key, weights = state[rows, _KEY].astype(int), state[rows, _FIRST : _FIRST + self.keys]
        orphaned = key < 0
        weights[orphaned], state[rows[orphaned], _ORPHAN] = 1 / self.keys, values[orphaned]
        seen = np.flatnonzero(~orphaned)
        key, told = key[seen], state[rows[seen], _ASKED] == 1
        weight, memory = weights[seen, key], state[rows[seen], _FIRST + self.keys + key]
        # An answer about a key that was not mentioned speaks for or against the orphan being its value (Bayes).
        informed = told & (memory < 0)
        evidence = (1 - weight) / self.values + weight * (values[seen] == state[rows[seen], _ORPHAN])
        weights[seen] /= np.where(informed, self.values * evidence, 1)[:, None]
        weights[seen, key] = 0
        state[rows, _FIRST : _FIRST + self.keys] = weights
        state[rows[seen], _FIRST + self.keys + key] = values[seen]

    def chain(self) -> Chain:
        return self._chain

    def self_match(self, state: State, orders: int = ORDERS) -> Float[np.ndarray, "B O"]:
        """Sum of Q^2 over the next n-grams: by the finite chain, or by reading on where the context holds an orphan."""
        result = np.empty((len(state), orders))
        weights = state[:, _FIRST : _FIRST + self.keys].sum(-1)
        # Where nothing or half a statement was read, an orphan is about to come.
        plain = (weights == 0) & (state[:, _PHASE] < NOTHING_READ) & ((state[:, _PHASE] != VALUE) | (state[:, _KEY] >= 0))
        known = (state[:, _FIRST + self.keys :] >= 0).sum(-1)
        key = state[:, _KEY].astype(int)
        mentioned = state[np.arange(len(state)), _FIRST + self.keys + key] >= 0
        for row in np.flatnonzero(plain):
            phase = int(state[row, _PHASE])
            about = (mentioned[row], state[row, _ASKED] == 1 and phase == VALUE) if phase in (VERB, VALUE) else (False, False)
            result[row] = self._squares[self._lumps[phase, int(known[row]), bool(about[0]), bool(about[1])], :orders]
        others = np.flatnonzero(~plain)
        for first in range(0, len(others), _ROWS):
            rows = others[first : first + _ROWS]
            result[rows] = super().self_match(state[rows], orders)
        return result

    @functools.cached_property
    def _lumps(self) -> dict[tuple[int, int, bool, bool], int]:
        """Number of each lumped state: kind of the next token, keys known, whether the present one is known, and is queried."""
        counts = range(self.keys + 1)
        every = [(FRESH, 0, False, False), *((KEY, count, False, False) for count in counts)]
        every += [(VERB, count, known, False) for count in counts for known in (False, True)]
        every += [(VALUE, count, known, asked) for count in counts for known in (False, True) for asked in (False, True)]
        return {lump: number for number, lump in enumerate(every)}

    @functools.cached_property
    def _chain(self) -> Chain:
        step, squares = (np.zeros((len(self._lumps), len(self._lumps))) for _ in range(2))
        entropy = np.zeros(len(self._lumps))

        def go(here: int, tokens: int, chance: float, *lump: int | bool) -> None:
            """Adds `tokens` tokens, each of probability `chance`, that lead to `lump`."""
            if tokens and chance:
                there = self._lumps[lump]  # type: ignore[index]
                step[here, there] += tokens * chance
                squares[here, there] += tokens * chance**2
                entropy[here] -= tokens * chance * np.log(chance)

        for (phase, count, known, asked), here in self._lumps.items():
            if phase in (FRESH, KEY):
                chance = (1.0 if phase == FRESH else 1 - self.ending) / self.keys
                go(here, count, chance, VERB, count, True, False)
                go(here, self.keys - count, chance, VERB, count, False, False)
                if phase == KEY:
                    go(here, 1, self.ending, FRESH, 0, False, False)
            elif phase == VERB:
                go(here, 1, self.settings, VALUE, count, known, False)
                go(here, 1, 1 - self.settings, VALUE, count, known, True)
            else:
                more = min(count + (not known), self.keys)  # "unknown" with all keys known does not occur
                certain = known and asked
                go(here, 1 if certain else self.values, 1.0 if certain else 1 / self.values, KEY, more, False, False)
        return Chain(step, squares, entropy)

    @functools.cached_property
    def _squares(self) -> Float[np.ndarray, "M O"]:
        """Sum of Q^2 over the next n-grams in each lumped state."""
        columns, current = [], np.ones(len(self._lumps))
        for _ in range(ORDERS):
            current = self._chain.squares @ current
            columns.append(current)
        return np.stack(columns, -1)

    @functools.cached_property
    def _phases(self) -> Float[np.ndarray, "4"]:
        """Share of the tokens that are a key after an end, a key or an end, a verb, a value."""
        shares = np.zeros(4)
        for (phase, *_), weight in zip(self._lumps, self._chain.stationary, strict=True):
            shares[phase] += weight
        return shares
