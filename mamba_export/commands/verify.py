"""mamba-export verify"""

from __future__ import annotations

import click

from mamba_export.commands.console import Console, common_options, runtime_options


@click.command("verify", short_help="Compare a bundle with its checkpoint, output by output.")
@click.argument("bundle", type=click.Path())
@click.option("--ckpt", help="The checkpoint the bundle was made from; engines can be compared without.")
@runtime_options
@common_options
def command(console: Console, bundle: str, ckpt: str | None, runtime: str, plugin: str | None, device: str) -> None:
    """Compare a bundle with the torch model on the checkpoint's weights.

    Prefill logits, every state, 32 steps with given tokens, and a prompt cut at random points; with --ragged bundles
    also rows of different lengths. With --runtime tensorrt the bundle's engines, ONNX Runtime and torch are compared
    with each other; without --ckpt the engines and ONNX Runtime. Exit code 4 when an output is out of tolerance; -v
    lists every output.

    \b
    Examples:
      mamba-export verify out/tiny --ckpt mamba1-tiny
      mamba-export verify out/tiny --ckpt mamba1-tiny --json
      mamba-export verify out/tiny --runtime tensorrt
    """
    from mamba_export.verification import verify

    report = verify(bundle, ckpt, device=device, runtime=runtime, plugin=plugin, progress=console)
    errors = report.errors if console.verbose else _worst_per_kind(report.errors)
    rows = [[e.scenario, e.output, f"{e.max_abs:.1e}", f"{e.relative:.1e}", "✓" if e.ok else "✗"] for e in errors]
    console.table("", ["scenario", "output", "max|Δ|", "relative", ""], rows, stdout=True)
    console.line("verify", report.summary())
    console.result(report.to_dict())
    report.raise_if_failed()


def _worst_per_kind(errors: list) -> list:  # type: ignore[type-arg]
    """The worst conv state, ssm state and logits of every scenario, and whatever failed."""
    worst: dict[tuple[str, str], object] = {}
    for error in errors:
        kind = "".join(c for c in error.output if not c.isdigit())
        key = (error.scenario, kind if error.ok else error.output)
        if key not in worst or error.relative > worst[key].relative:  # type: ignore[attr-defined]
            worst[key] = error
    return list(worst.values())
