"""Files and folders as a corpus: .txt, .jsonl and .parquet, the first two also compressed, read as streams."""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from calm.errors import UsageError, require_extra
from calm.text.compressed import BLOCK, COMPRESSED, Feed, kind_of, open_bytes
from calm.text.document_pieces import Piece, cut_blocks, cut_text
from calm.text.manifest import is_prepared, is_prepared_file
from calm.text.surrogates import replace_half_surrogates

TEXT = {".txt", ".text", ".md", ".rst", ".tokens", ".raw"}
LINES = {".jsonl", ".ndjson", ".json"}
PARQUET = {".parquet"}
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "val": "valid", "test": "test"}

_IN_FOLDERS = (TEXT - {".md", ".rst"}) | LINES
_NOT_TEXT = {"readme", "license", "licence", "copying", "notice", "sources"}  # files about a corpus, by their stem
_LONGEST_LINE = 1 << 28  # bytes of one record


class Listing(NamedTuple):
    """Files of a corpus in order, and the other files beside them."""

    files: list[Path]
    left_out: list[Path]


def list_files(path: Path, out: Path | None = None) -> Listing:
    """Lists the file itself, or all readable ones below a folder, without hidden files and READMEs.

    Prepared data below the folder is no part of the corpus, nor is anything below `out`: neither is listed at all.

    Raises UsageError: no such path, or nothing readable in the folder.
    """
    if path.is_file():
        return Listing([path], [])
    if not path.is_dir():
        raise UsageError(f"source {path}: local path not found; give pydoc, a file, a folder or hf:NAME")
    found = Listing([], [])
    for file in _walk(path, None if out is None else out.resolve()):
        usable = kind_of(file) in _IN_FOLDERS or file.suffix.lower() in PARQUET
        about = file.name.lower().split(".")[0] in _NOT_TEXT
        (found.files if usable and not about else found.left_out).append(file)
    if not found.files:
        kinds = Counter(file.suffix.lower() or file.name for file in found.left_out)
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        raise UsageError(
            f"source {path}: the folder holds no .txt, .jsonl or .parquet file (it has: {held}); other files with text are "
            "read when they are given by name"
        )
    return found


def _walk(path: Path, out: Path | None) -> Iterator[Path]:
    """Files below a folder in the order of their paths, but for hidden ones and prepared data."""
    ours = {folder for folder in path.rglob("*") if folder.is_dir() and (is_prepared(folder) or folder.resolve() == out)}
    prepared_root = path.resolve() == out or is_prepared(path)
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if ours.isdisjoint(file.parents) and not (prepared_root and file.parent == path and is_prepared_file(file.name)):
            yield file


def split_of(file: Path, root: Path) -> str | None:
    """Split in the name of a file: a folder `valid/`, or a word of the file name (`train.txt`, `wiki.valid.tokens`)."""
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
    found: Counter[str] | None = None,
) -> Iterator[Piece]:
    """Yields the documents of one file, in pieces.

    In a .txt the whole file is one document unless a separator is given. Records of a .jsonl may have a prompt in a field of
    its own, whose pieces then come first. Records whose text is null or empty are left out.

    Args:
      feed: gets the bytes of the file, as they lie on the disk.
      found: counts "records without text" and "separators" as the file is read.

    Raises:
      UsageError: the file is empty, binary or not UTF-8, a line is not JSON, a record lacks the field; the message says where.
      MissingExtraError: a .parquet without pyarrow.
    """
    found = Counter() if found is None else found
    kind = kind_of(path)
    if path.stat().st_size == 0:
        raise UsageError(f"source {path}: the file is empty")
    if prompt_field is not None and kind not in LINES:
        raise UsageError(f"source {path}: prompts (--prompt-field {prompt_field}) are read from .jsonl files only")
    if kind in PARQUET:
        if path.suffix.lower() in COMPRESSED:
            raise UsageError(f"source {path}: parquet is compressed inside; decompress the file as a whole first")
        return _parquet(path, field, feed, found)
    if kind in LINES:
        return _json_lines(path, field, feed, prompt_field, found)
    return cut_blocks(_text_blocks(path, feed), separator, lambda: found.update(separators=1))


def _text_blocks(path: Path, feed: Feed | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with open_bytes(path, feed) as file:
        while block := file.read(BLOCK):
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


def _json_lines(path: Path, field: str, feed: Feed | None, prompt_field: str | None, found: Counter[str]) -> Iterator[Piece]:
    fields = (field,) if prompt_field is None else (prompt_field, field)
    with open_bytes(path, feed) as file:
        for *prompt, text in _json_texts(file, path, fields):
            if text:  # a prompt without a response teaches nothing
                yield from (Piece(piece.text, False, True) for each in prompt if each for piece in cut_text(each))
                yield from cut_text(text)
            else:
                found["records without text"] += 1


def _json_texts(file: io.BufferedIOBase, path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
        if len(line) == _LONGEST_LINE:
            raise UsageError(
                f"source {path}: line {number} has {_LONGEST_LINE >> 20} MiB or more; records are needed, one a line"
            )
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON, not UTF-8
            raise UsageError(f"source {path}: line {number} is not JSON ({error})") from error
        except RecursionError as error:
            raise UsageError(f"source {path}: line {number} is nested too deeply to be a record") from error
        yield tuple(_text_of(record, field, path, number) for field in fields)


def _text_of(record: Any, field: str, path: Path, number: int) -> str:
    """Text of a field; null is no text."""
    if not isinstance(record, dict) or field not in record:
        names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UsageError(f"source {path}: line {number} has no text in field {field!r} (it has: {names}); see --field")
    value = record[field]
    if not isinstance(value, str | None):
        raise UsageError(f"source {path}: line {number}: field {field!r} is of type {type(value).__name__}, text is needed")
    return replace_half_surrogates(value or "")


def _parquet(path: Path, field: str, feed: Feed | None, found: Counter[str]) -> Iterator[Piece]:
    parquet, arrow = require_extra("pyarrow.parquet", "data"), require_extra("pyarrow", "data")
    if feed:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                feed(block)
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if field not in names:
            raise UsageError(f"source {path}: no column {field!r} (it has: {', '.join(names)}); see --field")
        column = table.schema_arrow.field(field).type
        kind = column.value_type if arrow.types.is_dictionary(column) else column
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            raise UsageError(f"source {path}: column {field!r} is of type {column}, text is needed; see --field")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield from cut_text(replace_half_surrogates(text))
                else:
                    found["records without text"] += 1
    except UsageError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"source {path}: not a parquet file, or damaged ({reason})") from error
