"""mamba-export onnx"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size
from mamba_export.targets import TARGETS

DTYPES = ("fp32", "fp16", "bf16")


@click.command("onnx", short_help="Export a checkpoint to a bundle of ONNX graphs: the main job.")
@click.option("--ckpt", required=True, help="Checkpoint: a folder, a .pt/.bin/.safetensors file, or a hub id.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder of the bundle.")
@click.option("--target", type=click.Choice(list(TARGETS)), default="tensorrt", show_default=True, help="See docs.")
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Weights and activations.")
@click.option("--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Of prefill.")
@click.option("--ragged", is_flag=True, help="Prefill takes seq_lens: right-padded rows of different lengths.")
@click.option("--fuse-step", is_flag=True, help="The step graph is one node, for a kernel that runs the whole model.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of the checkpoint; detected when left out.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the torch model.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@common_options
def command(console: Console, ckpt: str, out: str, format_: str | None, **options: Any) -> None:
    """Export a trained checkpoint to a bundle: prefill.onnx, step.onnx and weights.bin.

    \b
    Examples:
      mamba-export onnx --ckpt mamba1-tiny -o out/tiny
      mamba-export onnx --ckpt state-spaces/mamba-130m -o out/130m --target ort
      mamba-export onnx --ckpt model.pt -o out/edge --dtype fp16 --ragged
    """
    from mamba_export.export import export_onnx

    result = export_onnx(ckpt, out, format=format_, progress=console, **options)
    bundle, source = result.bundle, result.checkpoint
    spec = bundle.spec
    facts = f"{spec.family} · {spec.n_layer} layers · {count(source['parameters'])} parameters"
    console.line("checkpoint", f"{facts} · {source['format']} · sha256 {source['sha256'][:8]}…")
    for assumption in source["assumptions"]:
        console.line("assumed", assumption)
    nodes = {kind: sum(ops.values()) for kind, ops in bundle.manifest.nodes.items()}
    custom = [f"{n} {op}" for op, n in bundle.manifest.nodes["prefill"].items() if op.startswith("Mamba")]
    opset = f"opset {bundle.manifest.opset}"
    console.line("graph", " · ".join([f"prefill {nodes['prefill']} nodes", f"step {nodes['step']}", opset, *custom]))
    if result.verification is not None:
        console.line("verify", result.verification.summary())
    wrote = f"{out} ({size(bundle.nbytes)}, {console.elapsed:.0f} s)"
    console.line("wrote", f'{wrote} · next: mamba-export generate {out} --prompt "def "')
    manifest = dataclasses.asdict(bundle.manifest)
    console.result({"bundle": str(out), "bytes": bundle.nbytes, "seconds": console.elapsed, "manifest": manifest})
