"""Exclusive use of a folder by one process, on this machine or on another that shares the file system.

The operating system drops the lock when its process ends, however it ends, so no lock is ever stale. On file systems without
locks the library's marker file stands in, which it removes when its process is gone.
"""

import contextlib
import datetime
import json
import os
import platform
from pathlib import Path
from types import TracebackType

from calm.errors import CalmError


class FolderInUse(CalmError):
    """Another process writes to the folder; the message says which. Exit code 75 (EX_TEMPFAIL: run it again)."""

    exit_code = 75


class FolderLock:
    """Lock on a folder that exists, held inside a `with` block.

    Args:
      folder: what to lock; the lock is the file `.lock` in it, beside `.lock.json`, which says who holds it. Both are gone
        after the block.
      use: what the folder is used for, as in "calm data prepare"; shown to a process that finds the folder locked.

    Raises FolderInUse: another process holds the lock.
    """

    def __init__(self, folder: str | Path, use: str):
        import filelock  # here: `import calm.text` takes no time for it

        self.folder, self.use = Path(folder), use
        self._path, self._holder = self.folder / ".lock", self.folder / ".lock.json"
        self._lock = filelock.FileLock(self._path, blocking=False, thread_local=False)
        self._busy = filelock.Timeout

    def __enter__(self) -> "FolderLock":
        try:
            self._lock.acquire()
        except self._busy as error:
            raise FolderInUse(
                f"{self.folder}: in use by {self._said()}; wait for it to end, or choose another folder"
            ) from error
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"use": self.use, "process": os.getpid(), "host": platform.node(), "since": since}
        self._holder.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        # While it is held: whoever opened the file in the meantime finds that it has no name any more and tries again.
        for path in (self._holder, self._path):
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                path.unlink(missing_ok=True)
        self._lock.release()

    def _said(self) -> str:
        """Description of the process that holds the lock."""
        try:
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"{holder['use']} (process {holder['process']} on {holder['host']}, since {holder['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
