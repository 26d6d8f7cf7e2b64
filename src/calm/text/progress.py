"""Progress of a long command: a live bar on a terminal, a plain line every few seconds elsewhere. Always on standard error."""

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """`with Progress("encode", total) as progress: progress.advance(n)`; amounts are bytes of text. `total` None: not known."""

    def __init__(self, label: str, total: int | None = None, *, quiet: bool = False, every: float = 5.0):
        self._label, self._total, self._quiet, self._every = label, total, quiet, every
        self._done = self._skipped = 0
        self._start = self._told = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(
                progress.TextColumn("{task.description:<8}"), progress.BarColumn(), *columns, console=Console(stderr=True)
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total)
        return self

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._told > self._every:
            self._told = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def skip(self, amount: int) -> None:
        """Counts work that an earlier run did: it moves the bar and leaves the speed alone."""
        self._done += amount
        self._skipped += amount

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = (self._done - self._skipped) / seconds
        share = f" of {self._total / 1e6:.1f}" if self._total else ""
        left = f", {(self._total - self._done) / speed:.0f} s left" if self._total and speed > 0 else ""
        return f"{self._label}: {self._done / 1e6:.1f}{share} MB, {speed / 1e6:.1f} MB/s{left}"
