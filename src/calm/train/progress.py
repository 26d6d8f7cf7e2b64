"""Progress display of a run: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from calm.train.matrix_rate import MatrixRates


class Throughput(NamedTuple):
    """The speed of a stretch of steps."""

    seconds_per_step: float
    tokens_per_second: float
    matrix_share: float | None
    """FLOP/s of the objective as a fraction of the devices' probed matrix rate; None where it is not known"""


class Meter:
    """Steps per second of training alone: evaluations, checkpoints and the compilation of the first step are left out."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, rates: MatrixRates | None, precision: str, devices: int):
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._rate = rates.of(precision) * devices if rates else None
        self.flops_per_step = tokens_per_step * flops_per_token
        self.training_seconds = 0.0
        self._steps, self._since = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1

    def restart(self) -> None:
        """From now on: what was until now, a compilation, does not count."""
        self._steps, self._since = 0, time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """While this is open nothing counts; the device must have finished the steps that it was given."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def read(self) -> Throughput | None:
        """The speed since the last reading or restart; the device must have finished what it was given."""
        now = time.perf_counter()
        steps, seconds = self._steps, now - self._since
        self._steps, self._since = 0, now
        self.training_seconds += seconds
        if not steps:
            return None
        tokens = steps * self._tokens / max(seconds, 1e-9)
        return Throughput(seconds / steps, tokens, tokens * self._flops / self._rate if self._rate else None)


class Progress:
    """`with Progress(total) as progress: progress.update(step, loss, throughput)`."""

    def __init__(self, total: int, *, stream: Any = None, quiet: bool = False):
        self.total, self.stream, self.quiet = total, stream or sys.stderr, quiet
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if not self.quiet and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(file=self.stream), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, throughput: Throughput | None, flops: float | None = None) -> None:
        """After a record: what it says."""
        words = describe(loss, throughput, self.total - step, flops)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=words)
        else:
            self.line(f"step {step}/{self.total}  {words}")

    def line(self, text: str) -> None:
        """Something that happens once in a while."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)


def describe(loss: float, throughput: Throughput | None, steps_left: int, flops: float | None = None) -> str:
    """`loss 3.412  1.24e15 FLOPs  21.3k tokens/s  38% of the matrix rate  0:41:07 left`; `flops` since the run began."""
    words = [f"loss {loss:.4g}", *([] if flops is None else [f"{flops:.3g} FLOPs".replace("e+", "e")])]
    if throughput is not None:
        words.append(f"{short(throughput.tokens_per_second)} tokens/s")
        if throughput.matrix_share is not None:
            words.append(f"{throughput.matrix_share:.0%} of the matrix rate")
        minutes, seconds = divmod(round(steps_left * throughput.seconds_per_step), 60)
        words.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return "  ".join(words)


def short(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
