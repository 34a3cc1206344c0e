"""Progress of long stages: the library tells an observer, the command line draws a bar, tests stay silent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Tick = Callable[[int], None]


class Progress(Protocol):
    """Something that wants to know how far a job is."""

    def stage(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Tick]:
        """A context for one stage of known or unknown length; its value is called with the units done since."""


class _Silent:
    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        yield lambda done: None


silent: Progress = _Silent()
