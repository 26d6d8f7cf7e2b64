"""A walk through the pieces of a source, from any place in it, with the split of each piece."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

from calm.text.sources import Source
from calm.text.splits import Labelled, SplitPlan


@dataclasses.dataclass(kw_only=True)
class Cursor:
    """How far the source has been read.

    part, document, piece: place of the next piece; train_documents, train_characters: counts of what was read of the train
    parts; without_text: documents without a character; checksum: chained over the texts, for sources that are read only once.
    """

    part: int = 0
    document: int = 0
    piece: int = 0
    train_documents: int = 0
    train_characters: int = 0
    bytes: int = 0
    checksum: str = ""
    without_text: int = 0


def walk(source: Source, plan: SplitPlan, start: Cursor) -> Iterator[tuple[Cursor, list[Labelled]]]:
    """Each piece with its split, and the cursor after it. Never changes `start`."""
    cursor = dataclasses.replace(start)
    for part in range(start.part, len(source.parts)):
        split = source.parts[part].split
        for text, last, prompt in itertools.islice(source.pieces_from(part, cursor.document), cursor.piece, None):
            items: list[Labelled] = []
            if text or cursor.piece:  # else an empty document, which is counted and left out
                items = list(plan.label(text, last, split, cursor.train_documents, cursor.train_characters, prompt))
            cursor.without_text += last and not text and not cursor.piece
            if split == "train":
                cursor.train_characters += len(text)
                cursor.train_documents += last
            cursor.document, cursor.piece = (cursor.document + 1, 0) if last else (cursor.document, cursor.piece + 1)
            cursor.bytes += num_bytes(text)
            if not source.scannable:
                cursor.checksum = hashlib.sha256(cursor.checksum.encode() + text.encode()).hexdigest()
            yield dataclasses.replace(cursor), items
        cursor.part, cursor.document, cursor.piece = part + 1, 0, 0


def batches(walked: Iterator[tuple[Cursor, list[Labelled]]], characters: int) -> Iterator[list[tuple[Cursor, list[Labelled]]]]:
    """Groups the items of `walk` into batches of about so many characters."""
    batch: list[tuple[Cursor, list[Labelled]]] = []
    size = 0
    for cursor, items in walked:
        batch.append((cursor, items))
        size += sum(len(item.text) for item in items) + 1
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_bytes(text: str) -> int:
    """Length of a text in bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
