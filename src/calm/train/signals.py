"""The wish of a scheduler or a person that a run stop, noticed between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within the `with` block SIGTERM and SIGUSR1 set a flag instead of ending the process.

    With several hosts the flag cannot be each host's own, since all must stop at the same step: there the runtime's
    preemption notice, which SIGTERM raises, is agreed on by all.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "a preemption notice"
        return self.name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
