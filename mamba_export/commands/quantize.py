"""mamba-export quantize"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size
from mamba_export.commands.onnx import DTYPE_DEFAULT, DTYPES
from mamba_export.targets import TARGETS


@click.command("quantize", short_help="Quantize a checkpoint to a bundle.")
@click.option("--ckpt", required=True, help="Checkpoint: a folder, a .pt/.bin/.safetensors file, or a hub id.")
@click.option("--recipe", help="Name of a recipe (w8a16, w8a8, w4a16, …), or a .yaml file; with --search a list.")
@click.option("--calibration", type=click.Path(), help="Statistics file of mamba-export calibrate.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder of the bundle.")
@click.option("--state", type=click.Choice(["fp32", "fp16", "int8"]), help="Of the scan; over the recipe's.")
@click.option("--target", type=click.Choice(list(TARGETS)), default="tensorrt", show_default=True, help="See docs.")
@click.option("--dtype", type=click.Choice(DTYPES), help=f"Of all that stays float.  {DTYPE_DEFAULT}")
@click.option("--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Of prefill.")
@click.option("--ragged", is_flag=True, help="Prefill takes seq_lens: right-padded rows of different lengths.")
@click.option("--fuse-step", is_flag=True, help="The step graph is one node that takes packed integers; see docs.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of the checkpoint; detected when left out.")
@click.option("--device", default="cpu", show_default=True, help="Of torch, for recipes that run the model.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the quantized torch model.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--search", is_flag=True, help="Try recipes, show what each costs; OUT gets bundles of target ort.")
@click.option("--data", type=click.Path(), help="With --search: what quality is measured on.")
@click.option("--limit", type=click.IntRange(1), default=32, show_default=True, help="With --search: windows of data.")
@click.option("--html", type=click.Path(), help="With --search: also write a page with plots.")
@common_options
def command(
    console: Console,
    ckpt: str,
    out: str,
    format_: str | None,
    search: bool,
    data: str | None,
    limit: int,
    html: str | None,
    **options: Any,
) -> None:
    """Quantize a checkpoint by a recipe and export it: the same two graphs over quantized weights.

    With --search every recipe is tried, or those that --recipe lists, and a table shows size, quality and speed.

    \b
    Examples:
      mamba-export quantize --ckpt mamba1-tiny --recipe w8a16 -o out/w8
      mamba-export quantize --ckpt mamba1-tiny --recipe w4a16 --calibration calib.safetensors -o out/w4 --target ort
      mamba-export quantize --ckpt mamba1-tiny --recipe w8a16 -o out/w8-fused --dtype fp16 --fuse-step
      mamba-export quantize --ckpt mamba1-tiny --recipe mine.yaml --calibration calib.safetensors -o out/mine
      mamba-export quantize --ckpt mamba1-tiny --search --data eval.bin --calibration calib.safetensors -o out/all
    """
    if search:
        if data is None:
            raise click.UsageError("--search measures quality: add --data FILE, not what calibration has seen")
        if options["fuse_step"]:
            raise click.UsageError("--search fuses no step: leave --fuse-step out, then quantize by what you chose")
        options["dtype"] = options["dtype"] or "fp32"
        _search(console, ckpt, out, data, limit, html, {**options, "format": format_})
        return
    if options["recipe"] is None:
        raise click.UsageError("Missing option '--recipe'.")
    from mamba_export.quantization import quantize

    result = quantize(ckpt, out, format=format_, progress=console, **options)
    bundle, source = result.bundle, result.checkpoint
    spec, recipe = bundle.spec, bundle.manifest.quantization or {}
    facts = f"{spec.family} · {spec.n_layer} layers · {count(source['parameters'])} parameters"
    console.line("checkpoint", f"{facts} · {source['format']} · sha256 {source['sha256'][:8]}…")
    console.line("recipe", " · ".join(filter(None, [recipe.get("name"), recipe.get("description")])))
    nodes = {kind: sum(ops.values()) for kind, ops in bundle.manifest.nodes.items()}
    opset = f"opset {bundle.manifest.opset}"
    console.line("graph", " · ".join([f"prefill {nodes['prefill']} nodes", f"step {nodes['step']}", opset]))
    if result.verification is not None:
        console.line("verify", result.verification.summary())
    wrote = f"{out} ({size(bundle.nbytes)}, {console.elapsed:.0f} s)"
    console.line("wrote", f"{wrote} · next: mamba-export perplexity {out} --data FILE --ckpt {ckpt}")
    manifest = dataclasses.asdict(bundle.manifest)
    console.result({"bundle": str(out), "bytes": bundle.nbytes, "seconds": console.elapsed, "manifest": manifest})


def _search(
    console: Console, ckpt: str, out: str, data: str, limit: int, html: str | None, options: dict[str, Any]
) -> None:
    from mamba_export.calibration.search import COLUMNS, frontier_page, rows_for_people, search
    from mamba_export.verification.page import write_document

    recipes = [name for name in (options.pop("recipe") or "").split(",") if name]
    source = click.get_current_context().get_parameter_source("target")
    if source is click.core.ParameterSource.DEFAULT:
        options["target"] = "ort"  # which measures them
    chosen = {key: options[key] for key in ("calibration", "state", "target", "dtype", "format", "device", "force")}
    found = search(ckpt, out, data, recipes=recipes, limit=limit, progress=console, **chosen)
    console.table("", COLUMNS, rows_for_people(found), stdout=True)
    for recipe, reason in found.skipped.items():
        console.note(f"{recipe} was not tried: {reason}")
    console.line("checkpoint", f"perplexity {found.reference:.4f} · {found.tokens:,} tokens · ★ on the frontier")
    if html is not None:
        write_document(html, frontier_page(found))
        console.line("wrote", html)
    console.line("wrote", f"{out} ({len(found.points)} bundles, {console.elapsed:.0f} s)")
    console.result({**found.to_dict(), "seconds": console.elapsed, "html": html})
