"""mamba-export quantize"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size
from mamba_export.targets import TARGETS

DTYPES = ("fp32", "fp16", "bf16")


@click.command("quantize", short_help="Quantize a checkpoint to a bundle.")
@click.option("--ckpt", required=True, help="Checkpoint: a folder, a .pt/.bin/.safetensors file, or a hub id.")
@click.option("--recipe", required=True, help="Name of a recipe (w8a16, w8a8, w4a16, …), or a .yaml file.")
@click.option("--calibration", type=click.Path(), help="Statistics file of mamba-export calibrate.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder of the bundle.")
@click.option("--state", type=click.Choice(["fp32", "fp16", "int8"]), help="Of the scan; over the recipe's.")
@click.option("--target", type=click.Choice(list(TARGETS)), default="tensorrt", show_default=True, help="See docs.")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Of all that stays float.")
@click.option("--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Of prefill.")
@click.option("--ragged", is_flag=True, help="Prefill takes seq_lens: right-padded rows of different lengths.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of the checkpoint; detected when left out.")
@click.option("--device", default="cpu", show_default=True, help="Of torch, for recipes that run the model.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the quantized torch model.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@common_options
def command(console: Console, ckpt: str, out: str, format_: str | None, **options: Any) -> None:
    """Quantize a checkpoint by a recipe and export it: the same two graphs over quantized weights.

    \b
    Examples:
      mamba-export quantize --ckpt mamba1-tiny --recipe w8a16 -o out/w8
      mamba-export quantize --ckpt mamba1-tiny --recipe w4a16 --calibration calib.safetensors -o out/w4 --target ort
      mamba-export quantize --ckpt mamba1-tiny --recipe mine.yaml --calibration calib.safetensors -o out/mine
    """
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
