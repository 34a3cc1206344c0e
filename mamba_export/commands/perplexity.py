"""mamba-export perplexity"""

from __future__ import annotations

from typing import Any

import click

from mamba_export.commands.console import Console, common_options, runtime_options


@click.command("perplexity", short_help="Measure perplexity of a bundle on a token file.")
@click.argument("bundle", type=click.Path())
@click.option("--data", required=True, type=click.Path(), help=".bin (uint16 ids), .npy, or text.")
@click.option("--window", type=click.IntRange(1), default=1024, show_default=True, help="Positions per window.")
@click.option("--limit", type=click.IntRange(1), help="Use the first windows only.")
@click.option("--stream", is_flag=True, help="Run the file as one sequence, in pieces.")
@click.option("--ckpt", help="Compare with this checkpoint: KL divergence and top-1 agreement.")
@runtime_options
@common_options
def command(console: Console, bundle: str, **options: Any) -> None:
    """Measure how well a bundle predicts text.

    Windows do not overlap and start from zero states; every position predicts the token after it.

    \b
    Examples:
      mamba-export perplexity out/tiny --data eval.bin --limit 64
      mamba-export perplexity out/tiny --data README.md --stream --ckpt mamba1-tiny
    """
    from mamba_export.verification.perplexity import perplexity

    report = perplexity(bundle, progress=console, **options)
    rows = [["perplexity", f"{report.perplexity:.4f} ± {report.error:.4f}"]]
    if report.reference is not None and report.kl is not None and report.top1 is not None:
        rows.append(["checkpoint", f"{report.reference:.4f}"])
        rows.append(["KL divergence", f"{report.kl:.3e} nats"])
        rows.append(["same top token", f"{100 * report.top1:.3f} %"])
    rows.append(["tokens", f"{report.tokens:,} in {report.windows} windows"])
    console.table("", ["", ""], rows, stdout=True)
    console.result(report.to_dict())
