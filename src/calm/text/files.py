"""Files and folders as a corpus: .txt, .jsonl and .parquet, read as streams."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from calm.errors import UsageError, require_extra
from calm.text.pieces import Piece, cut_blocks, cut_text
from calm.text.surrogates import replace_half_surrogates

TEXT = {".txt", ".text", ".md", ".rst", ".tokens", ".raw"}
LINES = {".jsonl", ".ndjson", ".json"}
PARQUET = {".parquet"}
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "val": "valid", "test": "test"}

_BLOCK = 1 << 20
_NOT_TEXT = {"readme", "license", "licence", "copying", "notice", "sources"}  # files about a corpus, by their stem

Feed = Callable[[bytes], object]  # gets a file's raw bytes in order: a checksum, a progress bar


def list_files(path: Path) -> list[Path]:
    """The files of a corpus in order: the file itself, or all readable ones below a folder but hidden and README files.

    Raises UsageError: no such path, or nothing readable in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"source {path}: local path not found; give pydoc, a file, a folder or hf:NAME")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in (TEXT - {".md", ".rst"}) | LINES | PARQUET
        and file.is_file()
        and file.stem.lower() not in _NOT_TEXT
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise UsageError(f"source {path}: the folder holds no .txt, .jsonl or .parquet file")
    return found


def split_of(file: Path, root: Path) -> str | None:
    """The split that a name says: a folder `valid/`, or a word of the file name (`train.txt`, `wiki.valid.tokens`)."""
    relative = file.relative_to(root)
    for folder in relative.parts[:-1]:
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    words = re.split(r"[._\-\s]+", relative.name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def read_pieces(
    path: Path,
    *,
    field: str = "text",
    separator: str | None = None,
    feed: Feed | None = None,
    prompt_field: str | None = None,
) -> Iterator[Piece]:
    """The documents of one file, in pieces. In a .txt the whole file is one document unless a separator is given. Records of a
    .jsonl may have a prompt in a field of its own, whose pieces then come first.

    Raises:
      UsageError: the file is empty, binary or not UTF-8, a line is not JSON, a record lacks the field; the message says where.
      MissingExtraError: a .parquet without pyarrow.
    """
    if path.stat().st_size == 0:
        raise UsageError(f"source {path}: the file is empty")
    if prompt_field is not None and path.suffix.lower() not in LINES:
        raise UsageError(f"source {path}: prompts (--prompt-field {prompt_field}) are read from .jsonl files only")
    if path.suffix.lower() in PARQUET:
        return _parquet(path, field, feed)
    if path.suffix.lower() in LINES:
        return _json_lines(path, field, feed, prompt_field)
    return cut_blocks(_text_blocks(path, feed), separator)


def _text_blocks(path: Path, feed: Feed | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if feed:
                feed(block)
            yield _decoded(decoder, block, path, position)
            position += len(block)
    yield _decoded(decoder, b"", path, position, final=True)


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, position: int, final: bool = False) -> str:
    zero = block.find(b"\0")
    if zero >= 0:
        raise UsageError(f"source {path}: binary file (a zero byte at offset {position + zero}); UTF-8 text is needed")
    before = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        offset = position - before + error.start
        raise UsageError(
            f"source {path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {offset})"
        ) from error


def _json_lines(path: Path, field: str, feed: Feed | None, prompt_field: str | None) -> Iterator[Piece]:
    fields = (field,) if prompt_field is None else (prompt_field, field)
    with path.open("rb") as file:
        for *prompt, text in _json_texts(file, path, fields, feed):
            if text:  # a prompt without a response teaches nothing
                yield from (Piece(piece.text, False, True) for each in prompt if each for piece in cut_text(each))
                yield from cut_text(text)


def _json_texts(file: BinaryIO, path: Path, fields: tuple[str, ...], feed: Feed | None) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(file, 1):
        if feed:
            feed(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, not UTF-8
            raise UsageError(f"source {path}: line {number} is not JSON ({error})") from error
        for field in fields:
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UsageError(f"source {path}: line {number} has no text in field {field!r} (it has: {names}); see --field")
        yield tuple(replace_half_surrogates(record[field]) for field in fields)


def _parquet(path: Path, field: str, feed: Feed | None) -> Iterator[Piece]:
    parquet = require_extra("pyarrow.parquet", "data")
    if feed:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                feed(block)
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"source {path}: not a parquet file ({error})") from error
    if field not in table.schema_arrow.names:
        raise UsageError(f"source {path}: no column {field!r} (it has: {', '.join(table.schema_arrow.names)}); see --field")
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        for text in batch.column(0).to_pylist():
            if text:
                yield from cut_text(replace_half_surrogates(text))
