"""A checkpoint becomes a quantized bundle: the export with a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mamba_export.bundle import check_output
from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import UsageError
from mamba_export.export import DTYPES, ExportResult, check_fusable, make_graphs, write_graphs
from mamba_export.extras import require
from mamba_export.progress import Progress, silent
from mamba_export.targets import get_target
from mamba_export.tokens import check_tokenizer

if TYPE_CHECKING:
    from mamba_export.calibration.recipes import Recipe
    from mamba_export.calibration.statistics import Statistics

STATES = ("fp32", "fp16", "int8")


def quantize(
    ckpt: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe,
    calibration: str | Path | Statistics | None = None,
    state: str | None = None,
    target: str = "tensorrt",
    dtype: str | None = None,
    logits: Literal["last", "all"] = "last",
    ragged: bool = False,
    fuse_step: bool = False,
    verify: bool = True,
    force: bool = False,
    format: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> ExportResult:
    """Quantize a checkpoint and export it: a bundle like that of :func:`mamba_export.export_onnx`.

    Args:
        ckpt: folder, file or hub id.
        out: folder of the bundle; it appears only when complete.
        recipe: name of a recipe, or a YAML file; see :mod:`mamba_export.calibration.recipes`.
        calibration: statistics file of :func:`mamba_export.calibrate`, or open statistics; most recipes need one.
        state: type of the scan's state, over the recipe's: ``fp32``, ``fp16`` or ``int8``.
        target: as for an export.
        dtype: of activations and of the weights that are not quantized; None: ``fp32``, or ``fp16`` with ``fuse_step``.
        logits: as for an export.
        ragged: as for an export.
        fuse_step: as for an export; the node takes in_proj, out_proj and the head as packed integers, all of them in
            one format.
        verify: compare the bundle with the same quantized model in torch before it is handed over.
        force: replace an existing bundle.
        format: of the checkpoint, when detection is not wanted.
        device: of torch, for recipes that run the model.
        progress: gets told what is being done.

    Raises:
        UsageError: an argument, the recipe or the statistics are wrong, or a fused step has no place for what the
            recipe asks for.
        CheckpointError: the checkpoint is damaged or not supported.
        VerificationError: the graphs do not compute what the quantized model computes; nothing is left at ``out``.
        EnvironmentProblem: a package or disk space is missing.
    """
    require("torch", "onnx", "onnx_ir", "onnxscript", "yaml", extra="export", purpose="quantize")
    from mamba_export.calibration.collect import check_device
    from mamba_export.calibration.fused import check_fused
    from mamba_export.calibration.quantizer import quantize_model
    from mamba_export.calibration.recipes import load_recipe
    from mamba_export.calibration.statistics import load_statistics

    dtype = dtype or ("fp16" if fuse_step else "fp32")
    for name, value, known in (("dtype", dtype, DTYPES), ("logits", logits, ("last", "all"))):
        if value not in known:
            raise UsageError(f"no {name} named '{value}'", f"one of: {', '.join(known)}")
    if state is not None and state not in STATES:
        raise UsageError(f"the state can't be '{state}'", f"one of: {', '.join(STATES)}")
    # ONNX Runtime multiplies by blocks, with zero points; TensorRT has blocks of int4 alone, without.
    blocks = get_target(target).contrib
    chosen = load_recipe(recipe)
    if state is not None:
        chosen = dataclasses.replace(chosen, state=state)
    if fuse_step:
        check_fusable(target)
    check_output(out, force)
    check_device(device)
    stats: Any = load_statistics(calibration) if isinstance(calibration, (str, Path)) else calibration
    with open_checkpoint(ckpt, format) as checkpoint:
        if checkpoint.tokenizer is not None:
            check_tokenizer(checkpoint.tokenizer, checkpoint.spec.padded_vocab_size)
        if fuse_step:
            check_fused(chosen, checkpoint.spec, dtype)
        model = quantize_model(checkpoint, chosen, stats, dtype=dtype, blocks=blocks, device=device, progress=progress)
        graphs = make_graphs(checkpoint, target, dtype, logits, ragged, progress, model, fuse_step)
        return write_graphs(checkpoint, graphs, Path(out), verify, force, progress)
