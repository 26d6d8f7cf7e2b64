"""A corpus as a stream of pieces: documents cut where cutting does not change the tokens, so that any size fits in memory.

A byte-level BPE first splits text into words with their leading space. A cut after a line end between two visible characters
falls on such a border: the pieces' tokens are then those of the whole (tested with GPT-2's splitting).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

PIECE = 16_384  # characters; a piece of a longer document has between one and two times as many

_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_ANY_LINE = re.compile(r"\n")
_WORD = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """Part of a document. `last`: the document ends after it. `prompt`: it is read and not predicted."""

    text: str
    last: bool
    prompt: bool = False


def cut_text(text: str, start: int = 0) -> Iterator[Piece]:
    """Cuts one document, from `start` on. Joined, the pieces are the text."""
    while len(text) - start > 2 * PIECE:
        end = _cut(text, start)
        yield Piece(text[start:end], False)
        start = end
    yield Piece(text[start:], True)


def cut_blocks(
    blocks: Iterable[str], separator: str | None = None, separated: Callable[[], object] = lambda: None
) -> Iterator[Piece]:
    """Cuts the documents in blocks of text as they come from a file; where the blocks end does not matter.

    Without a separator all blocks are one document, kept to the character. With one, documents lose the white space
    around them, and empty documents are left out. `separated` is called at every separator.
    """
    margin = len(separator or "")
    rest, fresh = "", True  # fresh: nothing of the present document was handed out yet
    for block in blocks:
        *complete, rest = (rest + block).split(separator) if separator else (rest + block,)
        for text in complete:
            separated()
            yield from _finish(text, fresh, bool(separator))
            fresh = True
        if separator and fresh:
            rest = rest.lstrip()
        start = 0
        while len(rest) - start > 2 * PIECE + margin:
            end = _cut(rest, start)
            yield Piece(rest[start:end], False)
            start, fresh = end, False
        rest = rest[start:]
    yield from _finish(rest, fresh, bool(separator))


def _finish(text: str, fresh: bool, strip: bool) -> Iterator[Piece]:
    if strip:
        text = text.strip() if fresh else text.rstrip()
    if text or not fresh:
        yield from cut_text(text)


def _cut(text: str, start: int) -> int:
    """Place to cut, between one and two PIECEs after `start`: a line end if there is one, else a word's, else anywhere."""
    for pattern in (_LINE, _ANY_LINE, _WORD):
        found = pattern.search(text, start + PIECE, start + 2 * PIECE)
        if found:
            return found.end()
    return start + 2 * PIECE
