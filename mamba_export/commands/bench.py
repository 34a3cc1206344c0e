"""mamba-export bench"""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING

import click

from mamba_export.commands.console import Console, common_options, runtime_options, size, where

if TYPE_CHECKING:
    from mamba_export.bench import Measurement


def _ints(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    """A comma-separated list of numbers."""
    try:
        found = [int(part) for part in value.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0:
        raise click.BadParameter(f"'{value}' is not a list of numbers, like 128,512")
    return found


@click.command("bench", short_help="Measure prefill and decode speed, and memory.")
@click.argument("bundle", type=click.Path())
@click.option("-p", "--prompt", "prompts", default="512", callback=_ints, show_default=True, help="Prefill lengths.")
@click.option("-n", "--steps", "generations", default="128", callback=_ints, show_default=True, help="Steps; 0: none.")
@click.option("-b", "--batch", "batches", default="1", callback=_ints, show_default=True, help="Rows.")
@click.option("-r", "--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each test.")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Longest piece of prefill.")
@runtime_options
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--low-memory", is_flag=True, help="Read weights where they lie in the file; slower steps.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@click.option("--plot", "picture", type=click.Path(), help="Also draw tokens/s against the batch.")
@common_options
def command(
    console: Console,
    bundle: str,
    prompts: list[int],
    generations: list[int],
    batches: list[int],
    repetitions: int,
    chunk: int,
    runtime: str,
    plugin: str | None,
    device: str,
    threads: int | None,
    low_memory: bool,
    as_csv: bool,
    picture: str | None,
) -> None:
    """Tokens/s of prefill (pp) and of decoding (tg), latency percentiles, and the process's peak memory.

    -p, -n and -b take lists; every combination is a test. The latency of pp is the time to the first token.

    \b
    Examples:
      mamba-export bench out/tiny
      mamba-export bench out/tiny -p 128,512 -n 64 -b 1,4
      mamba-export bench out/tiny -b 1,2,4,8 --csv --plot speed.svg
    """
    from mamba_export.bench import plot, run_bench
    from mamba_export.bundle import Bundle
    from mamba_export.runtime.generate import open_runner

    opened = Bundle(bundle, check=False)
    runner = open_runner(opened, device, threads, low_memory, runtime, plugin)
    found = run_bench(runner, prompts, generations, batches, repetitions=repetitions, chunk=chunk, progress=console)
    title = f"{bundle} · {opened.target.name} · {opened.manifest.dtype} · {where(runtime, device)}"
    if as_csv and not console.as_json:
        _print_csv(found)
    else:
        console.table("", _COLUMNS, [_row(m) for m in found], stdout=True)
    console.line("bench", title)
    if picture is not None:
        plot(found, picture, title)
        console.line("wrote", picture)
    console.result(
        {"bundle": bundle, "runtime": runtime, "device": device, "dtype": opened.manifest.dtype, "threads": threads}
        | {"measurements": [m.to_dict() for m in found], "plot": picture}
    )


_COLUMNS = ["test", "batch", "tokens/s", "±", "p50 ms", "p90 ms", "p99 ms", "in engine", "peak memory", "device memory"]


def _row(m: Measurement) -> list[str]:
    return [
        *(m.test, str(m.batch), f"{m.tokens_per_second:.1f}", f"{m.deviation:.1f}"),
        *(f"{value:.2f}" for value in m.latency_ms.values()),
        "-" if m.engine_share is None else f"{m.engine_share:.1%}",
        size(m.peak_host),
        "-" if m.device_memory is None else size(m.device_memory),
    ]


def _print_csv(found: list[Measurement]) -> None:
    rows = []
    for m in found:
        row = m.to_dict()
        row.update({f"{name}_ms": value for name, value in row.pop("latency_ms").items()})
        rows.append(row)
    writer = csv.DictWriter(sys.stdout, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
