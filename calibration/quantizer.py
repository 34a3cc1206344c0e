"""Carry out a recipe: from a checkpoint and its statistics to a quantized model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mamba_export.checkpoint import Checkpoint
from mamba_export.errors import UsageError
from mamba_export.models.weights import load_parameter
from mamba_export.progress import Progress, silent
from mamba_export.quantized import EMBEDDING, HEAD, Linear, Matrix, QuantizedModel
from mamba_export.spec import ModelSpec

from .recipes import Recipe, Weights, load_recipe
from .rounding import round_to_nearest
from .statistics import Statistics

CALIBRATE = "mamba-export calibrate CKPT --data FILE -o calib.safetensors, then --calibration calib.safetensors"


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """Parameter names of all linear layers of the blocks, in model order."""
    kinds = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2")
    ends = tuple(f".{kind}.weight" for kind in kinds)
    return [name for name in checkpoint.tensors if name.startswith("backbone.layers.") and name.endswith(ends)]


def quantize_model(
    checkpoint: Checkpoint,
    recipe: str | Recipe,
    stats: Statistics | None = None,
    *,
    dtype: str = "fp32",
    blocks: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> QuantizedModel:
    """Choose the integers, scales and ranges that ``recipe`` asks for.

    Args:
        checkpoint: an open checkpoint.
        recipe: its name, file or content.
        stats: of a calibration of this checkpoint; needed by most recipes.
        dtype: of the bundle: float16 scales, or bfloat16 ones for ``bf16``.
        blocks: the target's weight-only products go by blocks, with zero points: see :meth:`Recipe.by_blocks`.
        device: of torch, for recipes that run the model.
        progress: gets told what is being done.

    Raises:
        UsageError: the recipe needs statistics and there are none, or they belong to another checkpoint.
    """
    recipe = load_recipe(recipe)
    recipe = recipe.by_blocks() if blocks else recipe
    needs = recipe.needs_calibration
    if needs and stats is None:
        raise UsageError(f"the recipe {recipe.name} needs calibration data, for {needs}", CALIBRATE)
    if stats is not None:
        stats.check(checkpoint.sha256())
    facts = {**recipe.to_dict(), "calibration": None if stats is None else dict(stats.provenance)}
    if stats is not None and needs:
        from .sequential import quantize_blocks

        quantized: QuantizedModel = quantize_blocks(checkpoint, recipe, stats, dtype, device, progress)
    else:
        quantized = QuantizedModel()
        names = linear_names(checkpoint)
        with progress.stage("round", total=len(names)) as tick:
            for name in names:
                scheme = recipe.layer(name.removesuffix(".weight")).weights
                if scheme.type != "float":
                    quantized.linears[name] = Linear(round_to_nearest(load_weight(checkpoint, name), scheme, dtype))
                tick(1)
        quantize_vocabulary(checkpoint, recipe, quantized, dtype)
    quantized.state = recipe.state  # type: ignore[assignment]
    quantized.recipe = {**facts, "promoted": quantized.promoted}
    return quantized


def load_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter in the checkpoint's own precision, float32 at most."""
    lazy = checkpoint.tensors[name]
    kept = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(lazy.dtype, torch.float32)
    return load_parameter(checkpoint, name, lazy.shape, kept)


def embedding_scheme(spec: ModelSpec, recipe: Recipe) -> Weights:
    """What the recipe means for the embedding of this checkpoint."""
    if recipe.tied:
        return dataclasses.replace(recipe.head, method="rtn")
    return recipe.embedding


def quantize_vocabulary(checkpoint: Checkpoint, recipe: Recipe, quantized: QuantizedModel, dtype: str) -> None:
    """Round the embedding and the head to nearest: one tensor or two."""
    tied = checkpoint.spec.tie_embeddings
    if recipe.head.type != "float":
        source = EMBEDDING if tied else HEAD
        quantized.linears[HEAD] = Linear(round_to_nearest(load_weight(checkpoint, source), recipe.head, dtype))
    set_embedding(checkpoint, recipe, quantized, dtype)


def set_embedding(checkpoint: Checkpoint, recipe: Recipe, quantized: QuantizedModel, dtype: str) -> None:
    """The embedding: the head's matrix where both are one tensor, else rounded by itself."""
    scheme = embedding_scheme(checkpoint.spec, recipe)
    if scheme.type == "float":
        return
    shared = recipe.tied and checkpoint.spec.tie_embeddings
    found: Matrix = (
        quantized.linears[HEAD].weight
        if shared
        else round_to_nearest(load_weight(checkpoint, EMBEDDING), scheme, dtype)
    )
    quantized.embedding = found
