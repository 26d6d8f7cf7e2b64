"""Splits of documents: by the name of the file, by a hash of the index, or by the place at the end of the text."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from calm.errors import UsageError
from calm.text.sources import Source

NAMES = ("train", "valid", "test")
FEW = 200  # below so many documents a hash would hold out too few of them, or a whole novel


class Labelled(NamedTuple):
    """A piece with its split; `last` and `prompt` as in `Piece`."""

    split: str
    text: str
    last: bool
    prompt: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Division of the train parts' documents. Parts of other splits keep their name.

    rule "named": nothing is held out. "hash": a document goes to valid or test by a hash of its index, so that adding
    documents moves none. "tail": the last characters, cut at line ends; `edges` are the first characters of valid and test.
    """

    rule: str
    valid: float = 0.0
    test: float = 0.0
    edges: tuple[tuple[int, str], ...] = ()

    def label(
        self, text: str, last: bool, split: str, document: int, position: int, prompt: bool = False
    ) -> Iterator[Labelled]:
        """Splits of the piece `text`, cut where it crosses from one split to another.

        `document` is its number among the train documents, `position` the number of their characters before it.
        """
        if split != "train" or self.rule == "named":
            yield Labelled(split, text, last, prompt)
        elif self.rule == "hash":
            draw = _uniform(document)
            name = "valid" if draw < self.valid else "test" if draw < self.valid + self.test else "train"
            yield Labelled(name, text, last, prompt)
        else:
            yield from self._by_place(text, last, position, prompt)

    def _by_place(self, text: str, last: bool, position: int, prompt: bool) -> Iterator[Labelled]:
        while True:
            split = ([name for edge, name in self.edges if edge <= position] or ["train"])[-1]
            coming = [edge - position for edge, _ in self.edges if position < edge < position + len(text)]
            cut = (text.find("\n", coming[0]) + 1 or coming[0]) if coming else len(text)
            yield Labelled(split, text[:cut], last, prompt)
            text, position = text[cut:], position + cut
            if not text:
                return


def check_shares(valid: float, test: float) -> None:
    """Checks the shares to hold out. Raises UsageError: they leave nothing to train on."""
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise UsageError(f"held out: need valid >= 0, test >= 0 and valid + test < 1, got valid={valid:g}, test={test:g}")


def make_plan(source: Source, valid: float, test: float, documents: int | None, characters: int | None) -> SplitPlan:
    """Plan for a source with so many train documents and characters (None: many, not counted)."""
    check_shares(valid, test)
    if source.named:
        present = {part.split for part in source.parts}
        valid, test = (0.0 if "valid" in present else valid), 0.0
    if valid + test == 0:
        return SplitPlan(rule="named")
    if documents is None or characters is None or documents >= FEW:
        return SplitPlan(rule="hash", valid=valid, test=test)
    edges = [(round(characters * (1 - valid - test)), "valid")] if valid else []
    edges += [(round(characters * (1 - test)), "test")] if test else []
    return SplitPlan(rule="tail", valid=valid, test=test, edges=tuple(edges))


def describe(plan: SplitPlan) -> dict[str, Any]:
    """Entry of the manifest about the plan."""
    return {"rule": plan.rule, "valid": plan.valid, "test": plan.test}


def _uniform(index: int) -> float:
    """splitmix64 of the index, in [0, 1): the same on every machine and in every version."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (z ^ z >> 31) / 2**64
