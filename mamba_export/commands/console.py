"""What every command shares: common options, progress bars, result lines and JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mamba_export.progress import Tick

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

F = TypeVar("F", bound=Callable[..., Any])


def common_options(function: F) -> F:
    """--json, -v and -q; the command receives a ready :class:`Console` as ``console``."""

    @click.option("--json", "as_json", is_flag=True, help="Print a machine-readable result on stdout.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors.")
    def wrapped(as_json: bool, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        return function(console=Console(as_json, verbose, quiet), **kwargs)

    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    params = getattr(function, "__click_params__", [])
    wrapped.__click_params__ = [*params, *wrapped.__click_params__]  # type: ignore[attr-defined]
    return wrapped  # type: ignore[return-value]


def runtime_options(function: F) -> F:
    """--runtime, --plugin and --device: what runs a bundle, and where."""
    names = ["ort", "tensorrt", "tensorrt-rtx"]
    text = "What runs it: ONNX Runtime, or the engines in the bundle (mamba-export build)."
    options = [
        click.option("--runtime", type=click.Choice(names), default="ort", show_default=True, help=text),
        click.option("--plugin", type=click.Path(), help="Engines: their plugin library; found when left out."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of ort."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def where(runtime: str, device: str) -> str:
    """What ran a bundle and where, for people."""
    return f"{runtime}, {device}" if runtime == "ort" else runtime


class Console:
    """Data goes to stdout, messages to stderr. With ``--json`` stdout holds one JSON object and nothing else."""

    def __init__(self, as_json: bool = False, verbose: bool = False, quiet: bool = False) -> None:
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet
        self.started = time.monotonic()

    @property
    def rich(self) -> RichConsole:
        """A rich console on stderr; honours NO_COLOR and terminals without colour."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, highlight=False, soft_wrap=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the command started."""
        return time.monotonic() - self.started

    def line(self, label: str, text: str) -> None:
        """One summary line on stderr: a label in the left column, facts behind it."""
        if not self.quiet:
            from rich.text import Text

            self.rich.print(Text.assemble((f"{label:<11} ", "bold"), text))

    def note(self, text: str) -> None:
        """A remark on stderr."""
        if not self.quiet:
            self.rich.print(text, style="dim", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stdout: bool = False) -> None:
        """A table; numbers are right-aligned. ``stdout``: it is the result, not a message."""
        if (self.quiet or self.as_json) and not (stdout and not self.as_json):
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
        for i, column in enumerate(columns):
            numeric = all(row[i][:1] in "0123456789-+." for row in rows if row[i])
            table.add_column(column, justify="right" if numeric and i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        wide = None if sys.stdout.isatty() else 160
        target = RichConsole(highlight=False, width=wide) if stdout else self.rich
        target.print(table)

    def result(self, data: dict[str, Any]) -> None:
        """The machine-readable result; printed with --json only."""
        if self.as_json:
            print(json.dumps(data, ensure_ascii=False, default=str))

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        """A progress bar on stderr while a stage runs (see :class:`mamba_export.progress.Progress`)."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda done: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
        bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.rich, transient=True)
        with bar:
            task = bar.add_task(name, total=total)
            yield lambda done: bar.advance(task, done)


def size(nbytes: float) -> str:
    """A size for people: 9.4 MB."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def count(n: float) -> str:
    """A count for people: 2.3 M."""
    for unit in ("", " k", " M"):
        if n < 1000:
            return f"{n:.0f}{unit}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.2f} B"
