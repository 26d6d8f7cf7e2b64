"""Small files that are never seen half written."""

import os
from pathlib import Path


def write_whole(path: Path, content: str) -> None:
    """Writes a small file as a whole or not at all; it is on the disk when this returns.

    Raises OSError: the disk is full, for one; the file that was there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
