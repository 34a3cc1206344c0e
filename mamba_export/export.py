"""The main job: a trained checkpoint becomes a bundle."""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mamba_export.bundle import (
    CONFIG,
    CPU_GRAPHS,
    PREFILL,
    STEP,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    Manifest,
    check_output,
    state_rows,
    write_bundle,
)
from mamba_export.checkpoint import Checkpoint, open_checkpoint
from mamba_export.errors import UsageError
from mamba_export.extras import require
from mamba_export.progress import Progress, silent
from mamba_export.targets import TARGETS, Target, get_target
from mamba_export.tokens import check_tokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

    from mamba_export.graph.quant import QuantizePass
    from mamba_export.graph.trace import GraphKind
    from mamba_export.quantized import QuantizedModel
    from mamba_export.states import StateType
    from mamba_export.verification.report import VerificationReport

DTYPES = ("fp32", "fp16", "bf16")


@dataclass
class ExportResult:
    """What :func:`export_onnx` made.

    Attributes:
        bundle: the finished bundle.
        verification: the report, or None when verification was not asked for.
        checkpoint: facts of the source: format, parameters, sha256, assumptions.
    """

    bundle: Bundle
    verification: VerificationReport | None
    checkpoint: dict[str, Any]


def export_onnx(
    ckpt: str | Path,
    out: str | Path,
    *,
    target: str = "tensorrt",
    dtype: str = "fp32",
    logits: Literal["last", "all"] = "last",
    ragged: bool = False,
    fuse_step: bool = False,
    verify: bool = True,
    force: bool = False,
    format: str | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Export a checkpoint to a bundle of two ONNX graphs, prefill and step, over one weights file.

    Args:
        ckpt: folder, file or hub id; see :func:`mamba_export.checkpoint.open_checkpoint`.
        out: folder of the bundle; it appears only when complete.
        target: one of :data:`mamba_export.targets.TARGETS`.
        dtype: of weights and activations. A, Δ, the scan and its state stay float32.
        logits: of the prefill graph: of the last valid position or of all.
        ragged: the prefill graph takes ``seq_lens`` for right-padded batches.
        fuse_step: the step graph is one node, ``MambaDecodeStack``, with the usual graph as its function body.
        verify: compare the bundle with the torch model before it is handed over.
        force: replace an existing bundle.
        format: of the checkpoint, when detection is not wanted.
        progress: gets told what is being done.

    Raises:
        UsageError: an argument or path is wrong.
        CheckpointError: the checkpoint is damaged or not supported.
        VerificationError: the graphs do not compute what the checkpoint computes; nothing is left at ``out``.
        EnvironmentProblem: a package or disk space is missing.
    """
    require("torch", "onnx", "onnx_ir", "onnxscript", extra="export", purpose="export")
    if dtype not in DTYPES:
        raise UsageError(f"no dtype named '{dtype}'", f"one of: {', '.join(DTYPES)}")
    if logits not in ("last", "all"):
        raise UsageError(f"logits can't be '{logits}'", "one of: last, all")
    get_target(target)
    if fuse_step:
        check_fusable(target)
    check_output(out, force)
    with open_checkpoint(ckpt, format) as checkpoint:
        if checkpoint.tokenizer is not None:
            check_tokenizer(checkpoint.tokenizer, checkpoint.spec.padded_vocab_size)
        graphs = make_graphs(checkpoint, target, dtype, logits, ragged, progress, fuse_step=fuse_step)
        return write_graphs(checkpoint, graphs, Path(out), verify, force, progress)


def check_fusable(target: str) -> None:
    """Whether a target has a place for a fused step.

    Raises:
        UsageError: it has none.
    """
    if not get_target(target).functions:
        keeping = [t.name for t in TARGETS.values() if t.functions]
        raise UsageError(f"target {target} has no place for a fused step", f"use --target {' or '.join(keeping)}")


def make_graphs(
    checkpoint: Checkpoint,
    target: str,
    dtype: str,
    logits: Literal["last", "all"],
    ragged: bool,
    progress: Progress,
    quantized: QuantizedModel | None = None,
    fuse_step: bool = False,
) -> Graphs:
    """Trace and lower all graphs of a bundle and give every weight its place."""
    from mamba_export.graph.external import place_weights
    from mamba_export.graph.fuse import FuseStepPass
    from mamba_export.graph.lower import lower, lower_for_cpu
    from mamba_export.graph.packed import shares_rows, step_format
    from mamba_export.graph.trace import TraceOptions, trace

    options = TraceOptions(dtype, logits, ragged)
    models: dict[str, ir.Model] = {}
    kinds: dict[GraphKind, str] = {"prefill": PREFILL, "step": STEP}
    passes: dict[GraphKind, QuantizePass] = {}
    ssm: StateType = "fp32" if quantized is None else quantized.state
    if quantized is not None:
        passes = _quantize_passes(quantized, dtype, get_target(target), fuse_step)
    fuse = FuseStepPass(checkpoint.spec, step_format(quantized), shares_rows(quantized)) if fuse_step else None
    for kind, file in kinds.items():
        with progress.stage(f"trace {kind}"):
            model = trace(checkpoint.spec, kind, options)
            if ssm != "fp32":
                from mamba_export.graph.state import StatePass

                StatePass(checkpoint.spec, dtype, get_target(target).ssm_layout, ssm)(model)
            for_cpu = lower_for_cpu(model, checkpoint.spec, dtype, get_target(target), passes.get(kind))
            models[file] = lower(model, checkpoint.spec, dtype, get_target(target), passes.get(kind))
            if fuse is not None and kind == "step":
                fuse(models[file])
            if for_cpu is not None:
                models[CPU_GRAPHS[file]] = for_cpu
    manifest = Manifest(
        spec=checkpoint.spec.to_dict(),
        target=target,
        dtype=dtype,
        logits=logits,
        ragged=ragged,
        opset=models[PREFILL].opset_imports[""],
        nodes={file.removesuffix(".onnx"): _count(model) for file, model in models.items()},
        checkpoint={},
        tools=_tools(),
        eos_token_ids=list(checkpoint.eos_token_ids),
        states=state_rows(checkpoint.spec, dtype, get_target(target), ssm),
        requires=get_target(target).requires,
        quantization=None if quantized is None else quantized.recipe,
    )
    fills = {name: fill for each in passes.values() for name, fill in each.fills.items()}
    return Graphs(models, place_weights(list(models.values())), manifest, fills, quantized)


def _quantize_passes(
    quantized: QuantizedModel, dtype: str, target: Target, fuse_step: bool
) -> dict[GraphKind, QuantizePass]:
    """Both graphs by one pass, unless the step is to be fused: it then takes the same integers as packed rows."""
    from mamba_export.graph.packed import PackedQuantizePass
    from mamba_export.graph.quant import QuantizePass

    both = QuantizePass(quantized, dtype, target)
    return {"prefill": both, "step": PackedQuantizePass(quantized, dtype, target) if fuse_step else both}


@dataclass
class Graphs:
    """All graphs of a bundle by file name, where their weights lie, and where the data of the quantized ones is."""

    models: dict[str, ir.Model]
    placements: dict[str, Any]
    manifest: Manifest
    fills: dict[str, Any]
    quantized: QuantizedModel | None = None


def write_graphs(
    checkpoint: Checkpoint, graphs: Graphs, out: Path, verify: bool, force: bool, progress: Progress
) -> ExportResult:
    """Write the bundle, verify it if asked, and move it into place."""
    from mamba_export.graph.external import save_graph, write_weights

    size = max((p.offset + p.nbytes for p in graphs.placements.values()), default=0)
    report = None
    with write_bundle(out, force, needed=size + (16 << 20)) as writer:
        with progress.stage("write weights", total=size) as tick, (writer.path / WEIGHTS).open("wb") as file:
            write_weights(checkpoint, graphs.models[PREFILL], graphs.placements, file, tick, graphs.fills)
        for name, model in graphs.models.items():
            save_graph(model, writer.path / name)
        config = checkpoint.config or checkpoint.spec.to_dict()
        (writer.path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if checkpoint.tokenizer is not None:
            shutil.copyfile(checkpoint.tokenizer, writer.path / TOKENIZER)
        with progress.stage("checksum", total=sum(p.stat().st_size for p in checkpoint.files)) as tick:
            graphs.manifest.checkpoint = _source(checkpoint, checkpoint.sha256(tick))
        writer.finish(graphs.manifest)
        if verify:
            from mamba_export.verification import verify_bundle

            bundle = Bundle(writer.path, check=False)
            report = verify_bundle(bundle, checkpoint, graphs.quantized, progress=progress)
            report.raise_if_failed()
            bundle.save_verification(report.to_dict())
    return ExportResult(Bundle(out, check=False), report, graphs.manifest.checkpoint)


def _source(checkpoint: Checkpoint, sha256: str) -> dict[str, Any]:
    return {
        "name": checkpoint.path.resolve().name,
        "format": checkpoint.format,
        "dtype": checkpoint.dtype,
        "parameters": checkpoint.n_parameters,
        "sha256": sha256,
        "assumptions": checkpoint.assumptions,
    }


def _count(model: ir.Model) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))


def _tools() -> dict[str, str]:
    names = ("mamba-export", "torch", "onnx", "onnxscript", "onnx-ir")
    tools = {"python": platform.python_version()}
    for name in names:
        try:
            tools[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            tools[name] = "from a checkout"
    return tools
