"""Progress of a long command on standard error: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Literal


class Progress:
    """Bar or lines for work whose amount is counted in bytes or in steps; use it as a context manager.

        with Progress("encode", total_bytes) as progress:
            progress.advance(len(block))

        with Progress("step", num_steps, unit="steps") as progress:
            progress.show(step, "loss 3.41  21k tokens/s")
            progress.line("saved a checkpoint")

    Args:
      label: name of the work.
      total: amount of work; None where it is not known.
      unit: "bytes" shows megabytes, speed and the time left; "steps" shows counts and the words given to `show`.
      stream: where it is written; standard error by default.
      quiet: shows nothing at all.
      every: seconds between the lines of `advance`, outside a terminal.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: Literal["bytes", "steps"] = "bytes",
        stream: Any = None,
        quiet: bool = False,
        every: float = 5.0,
    ):
        self._label, self._total, self._unit, self._quiet, self._every = label, total, unit, quiet, every
        self._stream = sys.stderr if stream is None else stream
        self._done = self._skipped = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and self._stream.isatty():
            from rich import progress
            from rich.console import Console

            label, bar = progress.TextColumn("{task.description:<8}", markup=False), progress.BarColumn(bar_width=None)
            speed = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
            columns = (label, bar, *speed) if self._unit == "bytes" else (progress.MofNCompleteColumn(), bar, label)
            self._bar = progress.Progress(*columns, console=Console(file=self._stream), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Counts `amount` more of the work."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._last_line > self._every:
            self._last_line = time.monotonic()
            self._print(self._sentence())

    def skip(self, amount: int) -> None:
        """Counts work that an earlier run did, which moves the bar and leaves the speed alone."""
        self._done += amount
        self._skipped += amount

    def show(self, done: int, words: str) -> None:
        """Sets the amount done and shows `words` beside it; outside a terminal every call is a line."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=words)
        elif not self._quiet:
            self._print(f"{self._label} {done}/{'?' if self._total is None else self._total}  {words}")

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar where there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _sentence(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = (self._done - self._skipped) / seconds
        left = f", {(self._total - self._done) / speed:.0f} s left" if self._total and speed > 0 else ""
        if self._unit == "steps":
            return f"{self._label}: {self._done:,}{f' of {self._total:,}' if self._total else ''}, {speed:.3g} a second{left}"
        share = f" of {self._total / 1e6:.1f}" if self._total else ""
        return f"{self._label}: {self._done / 1e6:.1f}{share} MB, {speed / 1e6:.1f} MB/s{left}"
