"""Files of bytes, compressed or not, as a stream: .gz, .bz2, .xz and .zst."""

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from calm.errors import MissingExtraError, UsageError, require_extra

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 20

Feed = Callable[[bytes], object]
"""gets a file's bytes in order, as they lie on the disk: a checksum, a progress bar"""


def kind_of(path: Path) -> str:
    """Lower-case suffix of what a file holds: ".jsonl" for "a.jsonl" and for "a.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def open_bytes(path: Path, feed: Feed | None = None) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading, decompressed by its suffix; `feed` gets all bytes of the file once it is read to its end.

    Raises:
      UsageError: the file is not what its suffix says, or is cut short.
      MissingExtraError: a .zst before Python 3.14 without pyarrow.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        fed = io.BufferedReader(_Fed(raw, feed), BLOCK)
        if suffix not in COMPRESSED:
            yield fed
            return
        try:
            with _decompressed(fed, suffix) as stream:
                yield stream
            while fed.read(BLOCK):  # what follows the last frame belongs to the checksum
                pass
        except (UsageError, MissingExtraError):
            raise
        except (EOFError, OSError, ValueError, lzma.LZMAError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"source {path}: damaged, or no {suffix} file ({reason})") from error


class _Fed(io.RawIOBase):
    """A raw stream whose bytes are handed to `feed` as they are read."""

    def __init__(self, raw: IO[bytes], feed: Feed | None):
        self._raw, self._feed = raw, feed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._raw.read(len(buffer))
        buffer[: len(block)] = block
        if self._feed and block:
            self._feed(block)
        return len(block)


def _decompressed(raw: Any, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    try:
        zstd = importlib.import_module("compression.zstd")  # Python 3.14
    except ImportError:
        arrow = require_extra("pyarrow", "data")
        return io.BufferedReader(_Arrow(arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd")), BLOCK)
    return zstd.ZstdFile(raw)


class _Arrow(io.RawIOBase):
    """pyarrow's stream as Python's buffered reader wants one."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)
