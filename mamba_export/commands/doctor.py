"""mamba-export doctor"""

from __future__ import annotations

import click

from mamba_export.commands.console import Console, common_options


@click.command("doctor", short_help="Show versions, devices and what is missing.")
@common_options
def command(console: Console) -> None:
    """Show versions, devices and what is missing, with the command that installs it.

    \b
    Examples:
      mamba-export doctor
      mamba-export doctor --json
    """
    from mamba_export.diagnosis import doctor

    facts = doctor()
    mark = {"ok": "✓", "missing": "–", "broken": "✗"}
    rows = [[mark[f["status"]], f["name"], f["detail"], f["purpose"], f["hint"]] for f in facts["findings"]]
    system = facts["system"]
    console.line("system", f"mamba-export {system['mamba-export']} · Python {system['python']} · {system['platform']}")
    console.table("", ["", "what", "found", "for", "get it with"], rows, stdout=True)
    console.line("can", " · ".join(f"{'✓' if yes else '–'} {job}" for job, yes in facts["can"].items()))
    console.result(facts)
