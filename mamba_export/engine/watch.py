"""What happens while TensorRT builds: its messages, its progress, and Ctrl-C."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from mamba_export.progress import Tick

T = TypeVar("T")


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings (``.errors``, ``.warnings``) instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Logger()


def make_monitor(trt: Any, tick: Tick) -> Any:
    """An IProgressMonitor that ticks with every finished step of the outermost phase, and cancels on ``.cancelled``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._outer: str | None = None
            self._steps, self._told = 1, 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self._outer is None:
                self._outer, self._steps = phase_name, max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._outer:
                self._tell((step + 1) * 100 // self._steps)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self._outer:
                self._tell(100)

        def _tell(self, percent: int) -> None:
            tick(max(0, percent - self._told))
            self._told = max(self._told, percent)

    return Monitor()


def run_cancellable(job: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Run ``job`` in a thread, so that this one stays awake for Ctrl-C.

    Raises:
        KeyboardInterrupt: after ``cancel`` was called and ``job`` has ended.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(job)
        try:
            while True:
                try:
                    return future.result(timeout=0.1)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        raise
        except KeyboardInterrupt:
            cancel()
            # A second Ctrl-C changes nothing: an interpreter that ends while the builder is at work aborts.
            while not future.done():
                with contextlib.suppress(KeyboardInterrupt):
                    concurrent.futures.wait([future], timeout=0.1)
            raise
