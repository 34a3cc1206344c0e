"""mamba-export onnx"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from mamba_export.checkpoint import FORMATS
from mamba_export.commands.console import Console, common_options, count, size
from mamba_export.targets import TARGETS

DTYPES = ("fp32", "fp16", "bf16")
DTYPE_DEFAULT = "[default: fp32; fp16 for a fused step by a recipe]"


@click.command("onnx", short_help="Export a checkpoint to a bundle of ONNX graphs: the main job.")
@click.option("--ckpt", required=True, help="Checkpoint: a folder, a .pt/.bin/.safetensors file, or a hub id.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder of the bundle.")
@click.option("--target", type=click.Choice(list(TARGETS)), default="tensorrt", show_default=True, help="See docs.")
@click.option("--dtype", type=click.Choice(DTYPES), help=f"Weights and activations.  {DTYPE_DEFAULT}")
@click.option("--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Of prefill.")
@click.option("--ragged", is_flag=True, help="Prefill takes seq_lens: right-padded rows of different lengths.")
@click.option("--fuse-step", is_flag=True, help="The step graph is one node, for a kernel that runs the whole model.")
@click.option("--recipe", help="Quantize: name of a recipe (w8a16, …) or a .yaml file; see mamba-export quantize.")
@click.option("--calibration", type=click.Path(), help="For the recipe: statistics file of mamba-export calibrate.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Of the checkpoint; detected when left out.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the torch model.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@common_options
def command(
    console: Console,
    ckpt: str,
    out: str,
    format_: str | None,
    recipe: str | None,
    calibration: str | None,
    **options: Any,
) -> None:
    """Export a trained checkpoint to a bundle: prefill.onnx, step.onnx and weights.bin.

    \b
    Examples:
      mamba-export onnx --ckpt mamba1-tiny -o out/tiny
      mamba-export onnx --ckpt state-spaces/mamba-130m -o out/130m --target ort
      mamba-export onnx --ckpt model.pt -o out/edge --dtype fp16 --ragged
      mamba-export onnx --ckpt mamba1-tiny -o out/w8 --recipe w8a16 --fuse-step
    """
    if recipe is not None:
        from mamba_export.quantization import quantize

        result = quantize(
            ckpt, out, recipe=recipe, calibration=calibration, format=format_, progress=console, **options
        )
    else:
        from mamba_export.export import export_onnx

        if calibration is not None:
            raise click.UsageError("--calibration is of use with --recipe alone")
        options["dtype"] = options["dtype"] or "fp32"
        result = export_onnx(ckpt, out, format=format_, progress=console, **options)
    bundle, source = result.bundle, result.checkpoint
    spec = bundle.spec
    facts = f"{spec.family} · {spec.n_layer} layers · {count(source['parameters'])} parameters"
    console.line("checkpoint", f"{facts} · {source['format']} · sha256 {source['sha256'][:8]}…")
    for assumption in source["assumptions"]:
        console.line("assumed", assumption)
    if bundle.manifest.quantization is not None:
        console.line("recipe", str(bundle.manifest.quantization["name"]))
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
