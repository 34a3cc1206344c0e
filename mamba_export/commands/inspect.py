"""mamba-export inspect"""

from __future__ import annotations

from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size


@click.command("inspect", short_help="Show what a checkpoint, bundle or engine holds.")
@click.argument("path")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of a checkpoint; detected when left out.")
@click.option("--plugin", type=click.Path(), help="Of an engine: the plugin library that it needs to be loaded.")
@common_options
def command(console: Console, path: str, format_: str | None, plugin: str | None) -> None:
    """Show what a checkpoint, bundle or engine holds; a bundle's checksums are verified.

    Of an engine: what the bundle's manifest knows of it and, where TensorRT can load it here, its bindings, layers and
    memory.

    \b
    Examples:
      mamba-export inspect mamba1-tiny
      mamba-export inspect out/tiny
      mamba-export inspect out/tiny --json
      mamba-export inspect out/tiny/engines/step-tensorrt-sm87.engine -v
    """
    from mamba_export.inspection import inspect

    facts = inspect(path, format=format_, plugin=plugin, progress=console)
    if facts["kind"] == "engine":
        _print_engine(facts, console)
        return console.result(facts)
    rows = _checkpoint_rows(facts) if facts["kind"] == "checkpoint" else _bundle_rows(facts)
    console.table("", ["", ""], [*rows, *_spec_rows(facts["spec"])], stdout=True)
    if facts["kind"] == "checkpoint" and console.verbose:
        table = [[t["name"], "×".join(map(str, t["shape"])), t["dtype"], size(t["bytes"])] for t in facts["tensors"]]
        console.table("\ntensors", ["name", "shape", "dtype", "size"], table, stdout=True)
    if facts["kind"] == "bundle":
        console.table("\nstates", ["input", "output", "shape", "dtype"], _state_rows(facts, console), stdout=True)
        files = [[name, size(entry["bytes"]), entry["sha256"][:16]] for name, entry in facts["files"].items()]
        console.table("\nfiles", ["name", "size", "sha256 ✓"], files, stdout=True)
        if facts["engines"]:
            columns = ["engine", "size", "profiles", "GPUs", "built by", "sha256"]
            console.table("\nengines", columns, [_engine_row(row) for row in facts["engines"]], stdout=True)
    console.result(facts)


def _engine_row(row: dict[str, Any]) -> list[str]:
    gpus, checked = " ".join(f"sm_{sm}" for sm in row["compute_capabilities"]), "✓" if row["intact"] else "✗ CHANGED"
    profiles = "; ".join(map(_profile, row["profiles"]))
    made = f"{row['runtime']} {row['version']}"
    return [row["file"], size(row["bytes"]), profiles, gpus, made, f"{row['sha256'][:16]} {checked}"]


def _profile(profile: dict[str, Any]) -> str:
    rows, tokens = (",".join(map(str, profile[axis])) for axis in ("batch", "seq"))
    return f"{profile['name']} {rows} × {tokens}"


def _print_engine(facts: dict[str, Any], console: Console) -> None:
    """What the manifest knows, then what TensorRT says."""
    row, loaded = facts["manifest"], facts["loaded"]
    rows = [["engine", f"{facts['file']} · {size(facts['bytes'])}"]]
    if row is None:
        rows.append(["manifest", "none beside it speaks of this file"])
    else:
        plugin = row["plugin"] and f"{row['plugin']['file']} · sha256 {row['plugin']['sha256'][:16]}"
        kinds = sorted(row["layers"].items(), key=lambda item: -item[1])
        shown = kinds if console.verbose else kinds[:6]
        network = " · ".join(
            [*(f"{number} {kind}" for kind, number in shown), *(["…"] if len(kinds) > len(shown) else [])]
        )
        rows += [
            ["built by", f"{row['runtime']} {row['version']} in {row['seconds']} s"],
            ["for", " ".join(f"sm_{sm}" for sm in row["compute_capabilities"])],
            ["profiles", "; ".join(map(_profile, row["profiles"]))],
            ["network", network],
            ["plugins", plugin or "none: function bodies"],
            ["sha256", f"{row['sha256'][:16]} {'✓' if facts['intact'] else '✗ the file was changed'}"],
        ]
    if loaded is None:
        rows.append(["not loaded", facts["not_loaded"]])
    else:
        rows.append(["loaded by", f"{loaded['runtime']} {loaded['version']}"])
        rows.append(["layers", f"{loaded['layers']} · {loaded['profiles']} profiles"])
        rows.append(["memory", f"{size(loaded['device_memory'])} of scratch memory"])
    console.table("", ["", ""], rows, stdout=True)
    if loaded is not None:
        _print_loaded(loaded, console)


def _print_loaded(loaded: dict[str, Any], console: Console) -> None:
    """Bindings and layers as TensorRT tells them."""
    shown = loaded["bindings"] if console.verbose else loaded["bindings"][:6]
    bindings = [[b["name"], b["mode"].lower(), b["dtype"], ", ".join(map(str, b["shape"]))] for b in shown]
    left = len(loaded["bindings"]) - len(shown)
    bindings += [[f"… and {left} more (-v)", "", "", ""]] if left else []
    console.table("\nbindings", ["tensor", "", "type", "shape"], bindings, stdout=True)
    if console.verbose:
        information = loaded["layer_information"].get("Layers", [])
        layers = [layer if isinstance(layer, dict) else {"Name": layer} for layer in information]
        rows = [[layer.get("Name", ""), layer.get("LayerType", "")] for layer in layers]
        console.table("\nlayers", ["name", "type"], rows, stdout=True)


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
