"""Tasks that ask for memory and nothing else: what to bring back is random, so only who kept it can know it.

A batch is tokens `[B T]`, targets `[B T]` and the positions that count: there the answer is the target, given the tokens up to
and with that position. Everywhere else nothing is asked. The first tokens of every vocabulary are the symbols that are to be
remembered; blank and signs come after them.

Two levels are exact. `chance`: each answer is uniform over so many symbols, whatever the token at its position, and the other
answers of a row do not tell it, so a model that mixes no positions cannot be above. `unordered`: what a model can have that
kept which symbols were shown and how often, and neither where nor with what.

Sources: the copying task of Hochreiter and Schmidhuber (1997) as in Arjovsky et al. 2016, arXiv:1511.06464; selective copying
and induction as in Gu and Dao 2023, arXiv:2312.00752 (the latter after Olsson et al. 2022, arXiv:2209.11895); multi-query
associative recall after Arora et al. 2023, arXiv:2312.04927, whose queries stand at distances drawn from a power law among
random tokens, where ours stand anywhere behind the pairs among blanks.
"""

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from calm.errors import UsageError

Tokens = Int[np.ndarray, "B T"]


class Batch(NamedTuple):
    """Rows of a task."""

    tokens: Tokens
    targets: Tokens
    """0 where nothing is asked"""
    counted: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryTask(abc.ABC):
    """Rows of one length from a seed."""

    _least: ClassVar[dict[str, int]] = {"symbols": 2, "values": 2, "delay": 0}
    """the least that a setting may be, where that is not 1"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (least := self._least.get(field.name, 1)):
                raise UsageError(f"{self.name}: {field.name} must be at least {least}, got {getattr(self, field.name)}")

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The task in a word."""

    @property
    @abc.abstractmethod
    def answers(self) -> int:
        """The symbols that an answer may be, all alike likely."""

    @property
    @abc.abstractmethod
    def shown(self) -> int:
        """The random symbols of a row that may be the answer, any of them as likely as another."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Symbols, blank and signs."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens T of a row."""

    @abc.abstractmethod
    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        """`batch` independent rows."""

    @property
    def chance(self) -> float:
        """The best accuracy without memory."""
        return 1 / self.answers

    @property
    def unordered(self) -> float:
        """The best accuracy with a memory of which symbols were shown how often: always the most frequent one."""
        return most_frequent(self.shown, self.answers) / self.shown

    def draw(self, batch: int, *, seed: int | tuple[int, ...]) -> Batch:
        """`batch` rows, the same for the same seed."""
        return self.rows(batch, np.random.default_rng(seed))

    def _empty(self, batch: int, blank: int) -> Batch:
        shape = (batch, self.length)
        return Batch(np.full(shape, blank, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedCopy(MemoryTask):
    """`items` symbols, a delay of blanks, then a sign for each item, at which the items come back in their order."""

    symbols: int = 8
    items: int = 4
    delay: int = 32
    """blanks between the last item and the first sign"""

    name = "delayed copy"

    @property
    def answers(self) -> int:
        return self.symbols

    @property
    def shown(self) -> int:
        return self.items

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        return 2 * self.items + self.delay

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._empty(batch, blank=self.symbols)
        tokens[:, : self.items] = generator.integers(0, self.symbols, (batch, self.items))
        tokens[:, -self.items :] = self.symbols + 1
        targets[:, -self.items :], counted[:, -self.items :] = tokens[:, : self.items], True
        return Batch(tokens, targets, counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(MemoryTask):
    """As delayed copying, but the items stand anywhere among the blanks, so that how far back they lie is not fixed."""

    symbols: int = 8
    items: int = 4
    spread: int = 32
    """tokens among which the items stand"""

    name = "selective copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items > self.spread:
            raise UsageError(f"{self.name}: items={self.items} must not be more than spread={self.spread}")

    @property
    def answers(self) -> int:
        return self.symbols

    @property
    def shown(self) -> int:
        return self.items

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        return self.spread + self.items

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._empty(batch, blank=self.symbols)
        items = generator.integers(0, self.symbols, (batch, self.items), dtype=np.int32)
        places = np.sort(generator.random((batch, self.spread)).argsort(-1)[:, : self.items], axis=-1)
        np.put_along_axis(tokens, places, items, axis=-1)
        tokens[:, -self.items :] = self.symbols + 1
        targets[:, -self.items :], counted[:, -self.items :] = items, True
        return Batch(tokens, targets, counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(MemoryTask):
    """Random symbols, among them once a sign; the row ends with that sign, and the symbol that followed it is asked for."""

    symbols: int = 16
    spread: int = 64
    """tokens before the last"""

    name = "induction"
    _least: ClassVar[dict[str, int]] = {"symbols": 2, "spread": 2}

    @property
    def answers(self) -> int:
        return self.symbols

    @property
    def shown(self) -> int:
        return self.spread - 1

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def length(self) -> int:
        return self.spread + 1

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._empty(batch, blank=self.symbols)
        tokens[:, :-1] = generator.integers(0, self.symbols, (batch, self.spread))
        place = generator.integers(0, self.spread - 1, (batch, 1))  # something follows it before the row ends
        np.put_along_axis(tokens, place, self.symbols, axis=-1)
        targets[:, -1:], counted[:, -1] = np.take_along_axis(tokens, place + 1, axis=-1), True
        return Batch(tokens, targets, counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(MemoryTask):
    """Multi-query associative recall: pairs of a key and a value, no key twice; then every key once more, in any order and
    anywhere, at which its value is asked for.
    """

    keys: int = 32
    """keys to choose from"""
    values: int = 32
    pairs: int = 8
    spread: int = 0
    """tokens behind the pairs, in which the queries stand; 0 = as many as there are pairs"""

    name = "associative recall"
    _least: ClassVar[dict[str, int]] = {"values": 2, "spread": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs <= self.keys:
            raise UsageError(f"{self.name}: pairs={self.pairs} must not be more than keys={self.keys}")
        if self.spread and self.spread < self.pairs:
            raise UsageError(f"{self.name}: spread={self.spread} must be 0 or at least pairs={self.pairs}")

    @property
    def answers(self) -> int:
        return self.values

    @property
    def shown(self) -> int:
        return self.pairs

    @property
    def vocab_size(self) -> int:
        return self.values + self.keys + 1

    @property
    def length(self) -> int:
        return 2 * self.pairs + (self.spread or self.pairs)

    def rows(self, batch: int, generator: np.random.Generator) -> Batch:
        tokens, targets, counted = self._empty(batch, blank=self.values + self.keys)
        keys = self.values + generator.random((batch, self.keys)).argsort(-1)[:, : self.pairs].astype(np.int32)
        values = generator.integers(0, self.values, (batch, self.pairs), dtype=np.int32)
        behind = 2 * self.pairs
        tokens[:, 0:behind:2], tokens[:, 1:behind:2] = keys, values
        places = behind + generator.random((batch, self.length - behind)).argsort(-1)[:, : self.pairs]
        for table, entries in ((tokens, keys), (targets, values), (counted, True)):
            np.put_along_axis(table, places, entries, axis=-1)
        return Batch(tokens, targets, counted)


def most_frequent(draws: int, symbols: int) -> float:
    """How often the most frequent of `symbols` comes on average, in so many uniform draws.

    The counts are those of independent Poisson variables of mean draws / symbols, given their sum; so the law of their maximum
    comes of powers of a truncated Poisson law, without large numbers.
    """
    mean = draws / symbols
    law = np.array([math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in range(draws + 1)])
    of_sum = math.exp(draws * math.log(draws) - draws - math.lgamma(draws + 1))
    expected = 0.0
    for most in range(draws):  # E max = sum over m of P(max > m)
        power, square, left = np.eye(1, draws + 1)[0], np.where(np.arange(draws + 1) <= most, law, 0.0), symbols
        while left:
            power = np.convolve(power, square)[: draws + 1] if left % 2 else power
            square, left = np.convolve(square, square)[: draws + 1], left // 2
        expected += 1 - power[draws] / of_sum
    return expected


PRESETS: dict[str, MemoryTask] = {
    "copy-16": DelayedCopy(delay=16),
    "copy-64": DelayedCopy(delay=64),
    "copy-256": DelayedCopy(delay=256),
    "selective-16": SelectiveCopy(spread=16),
    "selective-64": SelectiveCopy(spread=64),
    "induction-16": Induction(spread=16),
    "induction-64": Induction(spread=64),
    "induction-256": Induction(spread=256),
    "recall-4": AssociativeRecall(pairs=4),
    "recall-8": AssociativeRecall(pairs=8),
    "recall-16": AssociativeRecall(pairs=16),
    "recall-64": AssociativeRecall(keys=4096, values=4096, pairs=64, spread=384),
}
"""Tasks by name. `recall-64` has the vocabulary (8192), pairs and length (512) of the largest in Arora et al."""
