"""mamba-export perplexity"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mamba_export.commands.console import Console, common_options, runtime_options, size

if TYPE_CHECKING:
    from mamba_export.verification.greedy import GreedyReport
    from mamba_export.verification.perplexity import PerplexityReport


@click.command("perplexity", short_help="Measure perplexity of a bundle on a token file.")
@click.argument("bundle", type=click.Path())
@click.option("--data", required=True, type=click.Path(), help=".bin (uint16 ids), .npy, or text.")
@click.option("--window", type=click.IntRange(1), default=1024, show_default=True, help="Positions per window.")
@click.option("--limit", type=click.IntRange(1), help="Use the first windows only.")
@click.option("--stream", is_flag=True, help="Run the file as one sequence, in pieces.")
@click.option("--ckpt", help="Compare with this checkpoint: KL divergence, top-1 and greedy-text agreement.")
@click.option("--greedy", type=click.IntRange(0), default=16, show_default=True, help="Prompts of greedy text.")
@click.option("--html", type=click.Path(), help="Also write a page with plots: layers, outliers, drift.")
@runtime_options
@common_options
def command(console: Console, bundle: str, ckpt: str | None, greedy: int, html: str | None, **options: Any) -> None:
    """Measure how well a bundle predicts text.

    Windows do not overlap and start from zero states; every position predicts the token after it. With --ckpt the
    table says what the bundle, quantized or not, loses against the checkpoint in float32.

    \b
    Examples:
      mamba-export perplexity out/tiny --data eval.bin --limit 64
      mamba-export perplexity out/tiny --data eval.bin --ckpt mamba1-tiny --html out/quality.html
      mamba-export perplexity out/tiny --data README.md --stream
    """
    if ckpt is None:
        if html is not None:
            raise click.UsageError("--html compares with a checkpoint: add --ckpt CKPT")
        from mamba_export.verification.perplexity import perplexity

        report = perplexity(bundle, progress=console, **options)
        console.table("", ["", ""], _rows(report, None), stdout=True)
        console.result(report.to_dict())
        return
    from mamba_export.verification.quality import quality

    found = quality(bundle, ckpt=ckpt, greedy=greedy, details=html is not None, progress=console, **options)
    console.table("", ["", ""], _rows(found.perplexity, found.greedy), stdout=True)
    if html is not None:
        from mamba_export.verification.page import quality_page, write_document

        page = quality_page(found)
        write_document(html, page)
        console.line("wrote", f"{html} ({size(len(page.encode()))}, {console.elapsed:.0f} s)")
    console.result({**found.to_dict(), "html": html})


def _rows(report: PerplexityReport, greedy: GreedyReport | None) -> list[list[str]]:
    rows = [["perplexity", f"{report.perplexity:.4f} ± {report.error:.4f}"]]
    if report.reference is not None and report.increase is not None and report.increase_error is not None:
        rows.append(["checkpoint", f"{report.reference:.4f}"])
        rows.append(["increase", f"{100 * report.increase:.4f} ± {100 * report.increase_error:.4f} %"])
    if report.kl is not None and report.kl_p99 is not None and report.kl_max is not None and report.top1 is not None:
        rows.append(["KL divergence", f"{report.kl:.3e} nats · p99 {report.kl_p99:.3e} · max {report.kl_max:.3e}"])
        rows.append(["same top token", f"{100 * report.top1:.3f} %"])
    if greedy is not None:
        rows.append(["greedy text", f"{100 * greedy.agreement:.1f} % before the first difference"])
        equal = round(greedy.same_texts * greedy.prompts)
        rows.append(["", f"{equal} of {greedy.prompts} texts of {greedy.length} tokens equal"])
    rows.append(["tokens", f"{report.tokens:,} in {report.windows} windows"])
    return rows
