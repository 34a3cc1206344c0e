"""mamba-export inspect"""

from __future__ import annotations

from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size


@click.command("inspect", short_help="Show what a checkpoint or bundle holds.")
@click.argument("path")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of a checkpoint; detected when left out.")
@common_options
def command(console: Console, path: str, format_: str | None) -> None:
    """Show what a checkpoint or bundle holds; a bundle's checksums are verified.

    \b
    Examples:
      mamba-export inspect mamba1-tiny
      mamba-export inspect out/tiny
      mamba-export inspect out/tiny --json
    """
    from mamba_export.inspection import inspect

    facts = inspect(path, format=format_, progress=console)
    rows = _checkpoint_rows(facts) if facts["kind"] == "checkpoint" else _bundle_rows(facts)
    console.table("", ["", ""], [*rows, *_spec_rows(facts["spec"])], stdout=True)
    if facts["kind"] == "checkpoint" and console.verbose:
        table = [[t["name"], "×".join(map(str, t["shape"])), t["dtype"], size(t["bytes"])] for t in facts["tensors"]]
        console.table("\ntensors", ["name", "shape", "dtype", "size"], table, stdout=True)
    if facts["kind"] == "bundle":
        console.table("\nstates", ["input", "output", "shape", "dtype"], _state_rows(facts, console), stdout=True)
        files = [[name, size(entry["bytes"]), entry["sha256"][:16]] for name, entry in facts["files"].items()]
        console.table("\nfiles", ["name", "size", "sha256 ✓"], files, stdout=True)
    console.result(facts)


def _checkpoint_rows(facts: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["checkpoint", f"{facts['format']} · {facts['spec']['family']}"],
        ["parameters", f"{count(facts['parameters'])} · {size(facts['bytes'])} · {facts['dtype']}"],
        ["tokenizer", "yes" if facts["tokenizer"] else "none"],
    ]
    return rows + [["assumed", text] for text in facts["assumptions"]]


def _bundle_rows(facts: dict[str, Any]) -> list[list[str]]:
    source, verification = facts["checkpoint"], facts["verification"]
    checked = "not verified"
    if verification is not None:
        worst = max(row["relative"] for row in verification["outputs"])
        checked = (
            f"{len(verification['outputs'])} outputs within {worst:.1e} of the checkpoint ({verification['runtime']})"
        )
    graphs = [f"{kind} {sum(ops.values())} nodes" for kind, ops in facts["nodes"].items()]
    custom = [f"{n} {op}" for op, n in facts["nodes"]["prefill"].items() if op.startswith("Mamba")]
    return [
        ["bundle", f"target {facts['target']} · {facts['dtype']} · {size(facts['bytes'])}"],
        ["made from", f"{source['name']} ({source['format']}) · sha256 {source['sha256'][:16]}"],
        ["graphs", " · ".join([*graphs, f"opset {facts['opset']}", *custom])],
        ["prefill", f"logits {facts['logits']}{' · ragged' if facts['ragged'] else ''}"],
        ["verified", checked],
    ]


def _spec_rows(spec: dict[str, Any]) -> list[list[str]]:
    """The dimensions that this family has."""
    names = ["d_model", "n_layer", "vocab_size", "d_inner", "d_state", "d_conv"]
    names += ["dt_rank"] if spec["family"] == "mamba1" else ["nheads", "headdim", "ngroups"]
    return [["model", " · ".join(f"{name} {spec[name]}" for name in names)]]


def _state_rows(facts: dict[str, Any], console: Console) -> list[list[str]]:
    states = facts["states"] if console.verbose else facts["states"][:2]
    rows = [[s["name"], s["present"], ", ".join(map(str, s["shape"])), s["dtype"]] for s in states]
    left = len(facts["states"]) - len(states)
    return rows + ([[f"… and {left} more of the same shapes", "", "", ""]] if left > 0 else [])
