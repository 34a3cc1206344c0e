"""mamba-export calibrate"""

from __future__ import annotations

from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, size


@click.command("calibrate", short_help="Collect activation statistics for quantization.")
@click.argument("ckpt")
@click.option("--data", required=True, type=click.Path(), help=".bin (uint16 ids), .npy, or text.")
@click.option("-o", "--out", required=True, type=click.Path(), help="The statistics file (safetensors).")
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows of data.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens a window.")
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu or cuda.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of the checkpoint; detected when left out.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common_options
def command(console: Console, ckpt: str, data: str, out: str, format_: str | None, **options: Any) -> None:
    """Run data through a checkpoint and keep what its linear layers see.

    An interrupted run continues when it is started again.

    \b
    Examples:
      mamba-export calibrate mamba1-tiny --data train.bin -o calib.safetensors
      mamba-export calibrate mamba1-tiny --data README.md -o calib.safetensors --windows 16
    """
    from pathlib import Path

    from mamba_export.calibration.collect import calibrate
    from mamba_export.calibration.observers import percentile

    stats = calibrate(ckpt, data, out, format=format_, progress=console, **options)
    rows, facts = [], {}
    for name, observer in stats.inputs.items():
        mean = float((observer.squares.sum() / (observer.tokens * observer.squares.numel())).sqrt())
        peak, most = float(observer.peak.max()), percentile(observer.counts, 99.99)
        rows.append([name.removeprefix("backbone."), f"{mean:.3f}", f"{most:.2f}", f"{peak:.2f}"])
        facts[name] = {"rms": mean, "p99.99": most, "peak": peak}
    if console.verbose:
        console.table("", ["input of", "rms", "99.99 %", "peak"], rows)
    elif rows:
        widest = max(rows, key=lambda row: float(row[3]) / float(row[1]))
        console.line("outliers", f"the input of {widest[0]} peaks at {widest[3]}, its rms is {widest[1]}")
    seen = f"{stats.done} windows of {stats.ids.shape[1]} tokens"
    wrote = f"{out} ({size(Path(out).stat().st_size)}, {seen}, {console.elapsed:.0f} s)"
    console.line(
        "wrote", f"{wrote} · next: mamba-export quantize --ckpt {ckpt} --recipe w8a8 --calibration {out} -o OUT"
    )
    console.result({"file": str(out), "provenance": stats.provenance, "inputs": facts, "seconds": console.elapsed})
