"""Quantize block by block: every layer sees the calibration data as the layers before it, quantized, leave it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.lm import Block, MambaLM
from mamba_export.models.mamba2 import GatedRMSNorm
from mamba_export.models.weights import load_model
from mamba_export.progress import Progress, silent
from mamba_export.quantized import EMBEDDING, FP8_MAX, HEAD, InputQuantization, Linear, Matrix, QuantizedModel
from mamba_export.states import state_table

from .gptq import gptq, output_error
from .observers import INT8_MAX, Observer, clip_value
from .promotion import promote
from .quantizer import load_weight, set_embedding
from .recipes import Layer, Recipe
from .rotation import block_size, rotate
from .rounding import round_to_nearest
from .scans import fast_scans
from .simulation import SimulatedLinear
from .statistics import Statistics
from .tuning import tune

_TOKENS = 2048
_EQUALIZED = ("in_proj", "out_proj")
_ORDER = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2")


class _Reached(Exception):
    """The layer that is watched was reached; the rest of the block is not needed."""


class Stream:
    """The residual stream of all calibration windows in front of one block."""

    def __init__(self, model: MambaLM, ids: Tensor, device: str) -> None:
        self.spec, self.device = model.spec, device
        rows = max(1, _TOKENS // ids.shape[1]) if device == "cpu" else 32
        self.batches: list[tuple[Tensor, Tensor | None]] = [
            (model.backbone.embedding(part.to(device)), None) for part in ids.split(rows)
        ]

    def run(self, block: Block, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The block's outputs, batch by batch."""
        shapes = [s.shape for s in state_table(self.spec, "fp32") if s.layer == index]
        for x, residual in self.batches:
            conv, ssm = (torch.zeros(x.shape[0], *shape, device=x.device) for shape in shapes)
            y, total, _, _ = block(x, residual, conv, ssm, None)
            yield y, total

    def advance(self, block: Block, index: int) -> None:
        """Go to the next block."""
        self.batches = list(self.run(block, index))


def quantize_blocks(
    checkpoint: Checkpoint, recipe: Recipe, stats: Statistics, dtype: str, device: str, progress: Progress = silent
) -> QuantizedModel:
    """Carry out a recipe that needs calibration; see :func:`~.quantizer.quantize_model`."""
    quantized = QuantizedModel()
    model = load_model(checkpoint, dtype, "fp32").to(device)
    with torch.inference_mode(), fast_scans(), progress.stage("quantize", total=len(model.backbone.layers) + 1) as tick:
        _head(checkpoint, model, recipe, stats, quantized, dtype)
        stream = Stream(model, stats.ids, device)
        for i, block in enumerate(model.backbone.layers):
            assert isinstance(block, Block)
            for kind in _ORDER:
                part = block.mixer if kind.endswith("proj") else block.mlp
                if part is not None and hasattr(part, kind):
                    _quantize_layer(checkpoint, stream, block, i, part, kind, recipe, stats, quantized, dtype)
            stream.advance(block, i)
            tick(1)
    if recipe.promote.bits:
        quantized.promoted = promote(checkpoint, quantized, stats, recipe.promote, dtype, device, progress)
    if recipe.tune.steps:
        tune(checkpoint, quantized, stats.ids, recipe.tune, dtype, device, progress)
    return quantized


def _head(
    checkpoint: Checkpoint, model: MambaLM, recipe: Recipe, stats: Statistics, quantized: QuantizedModel, dtype: str
) -> None:
    """The head first, so that a tied embedding is what the blocks see."""
    if recipe.head.type != "float":
        source = EMBEDDING if checkpoint.spec.tie_embeddings else HEAD
        importance = (stats.inputs["lm_head"].squares / stats.inputs["lm_head"].tokens).float()
        weight = load_weight(checkpoint, source)
        quantized.linears[HEAD] = Linear(round_to_nearest(weight, recipe.head, dtype, importance))
    set_embedding(checkpoint, recipe, quantized, dtype)
    if quantized.embedding is not None:
        table = model.get_parameter(EMBEDDING)
        table.data = quantized.embedding.dequantize().to(table)


def _quantize_layer(
    checkpoint: Checkpoint,
    stream: Stream,
    block: Block,
    index: int,
    part: nn.Module,
    kind: str,
    recipe: Recipe,
    stats: Statistics,
    quantized: QuantizedModel,
    dtype: str,
) -> None:
    path = f"backbone.layers.{index}.{'mixer' if part is block.mixer else 'mlp'}.{kind}"
    how = recipe.layer(path)
    if how.weights.type == "float" and how.inputs.type == "float":
        return
    module = getattr(part, kind)
    weight = load_weight(checkpoint, f"{path}.weight").to(module.weight.device).float()
    linear = Linear(Matrix("int8", weight, weight, 0))  # the matrix follows
    linear.rotation = block_size(weight.shape[1], how.rotate)
    linear.smooth = _smoothing(weight, how, stats, path)
    watched = _Watch(weight.shape[1], weight.device, how.weights.method == "gptq", linear)
    if how.inputs.type != "float" or watched.hessian is not None:
        _capture(stream, block, index, part, kind, watched)
    if how.inputs.type == "float" and how.smooth and watched.hessian is not None and not linear.rotation:
        linear.smooth = _equalizing(weight, watched.hessian, how, dtype) if kind in _EQUALIZED else None
        if linear.smooth is not None:
            watched.hessian *= linear.smooth[:, None] * linear.smooth
    smooth = linear.smooth
    if smooth is not None:
        weight = weight / smooth
        quantized.divided[f"{path}.weight"] = smooth.cpu()
        _fold(block, index, kind, linear, quantized)
    weight = rotate(weight, linear.rotation)
    if how.inputs.type != "float":
        limit = INT8_MAX if how.inputs.type == "int8" else FP8_MAX
        clip = clip_value(watched.observer, how.inputs)
        linear.input = InputQuantization(how.inputs.type, max(clip, 1e-6) / limit)  # type: ignore[arg-type]
    if how.weights.method == "gptq" and how.weights.type in ("int4", "int8"):
        assert watched.hessian is not None
        linear.weight = gptq(weight, watched.hessian, how.weights, dtype)
    elif how.weights.type != "float":
        importance = watched.observer.squares.float() if watched.observer.tokens else None
        linear.weight = round_to_nearest(weight, how.weights, dtype, importance)
    else:
        return
    new = SimulatedLinear(linear, getattr(module, "bias", None), module.weight.dtype, module.weight.device)
    setattr(part, kind, new)
    linear.weight.values, linear.weight.scales = linear.weight.values.cpu(), linear.weight.scales.cpu()
    linear.smooth = None if linear.smooth is None else linear.smooth.cpu()
    quantized.linears[f"{path}.weight"] = linear


def _fold(block: Block, index: int, kind: str, linear: Linear, quantized: QuantizedModel) -> None:
    """Let the norm before the layer do the multiplication, where there is one."""
    place, norm = "norm", block.norm
    if kind == "out_proj":
        mixer = block.mixer
        if not isinstance(getattr(mixer, "norm", None), GatedRMSNorm) or mixer.spec.d_mlp:  # type: ignore[union-attr]
            return
        place, norm = "mixer.norm", mixer.norm  # type: ignore[assignment]
    elif kind != "in_proj" or getattr(norm, "bias", None) is not None:
        return
    assert linear.smooth is not None
    norm.weight.data = norm.weight * linear.smooth
    quantized.floats[f"backbone.layers.{index}.{place}.weight"] = norm.weight.data.float().cpu()
    linear.smooth = None


def _equalizing(weight: Tensor, hessian: Tensor, how: Layer, dtype: str) -> Tensor | None:
    """Activation-aware scales (AWQ, Lin et al. 2023): active channels get a larger part of the integers' range."""
    rms = hessian.diagonal().clamp(min=1e-12).sqrt()
    rows = weight[:: max(1, weight.shape[0] // 256)]
    best, least = None, output_error(rows, gptq(rows, hessian, how.weights, dtype, 0), hessian)
    for exponent in (0.25 * how.smooth, 0.5 * how.smooth, how.smooth):
        smooth = rms**-exponent
        smooth = smooth / smooth.log().mean().exp()
        scaled = hessian * smooth[:, None] * smooth
        error = output_error(rows / smooth, gptq(rows / smooth, scaled, how.weights, dtype, 0), scaled)
        if error < 0.99 * least:
            best, least = smooth, error
    return best


def _smoothing(weight: Tensor, how: Layer, stats: Statistics, path: str) -> Tensor | None:
    """SmoothQuant: what the input is multiplied by so that its channels and those of the weight share the range."""
    if not how.smooth or how.inputs.type == "float":
        return None
    peak = stats.inputs[path].peak.to(weight.device).float().clamp(min=1e-5)
    other = weight.abs().amax(0).clamp(min=1e-5)
    smooth = other ** (1 - how.smooth) / peak**how.smooth
    return smooth / smooth.log().mean().exp()


class _Watch:
    """What the input of a layer looks like after smoothing and rotation."""

    def __init__(self, columns: int, device: torch.device, hessian: bool, linear: Linear) -> None:
        self.observer = Observer(columns, device)
        self.hessian = torch.zeros(columns, columns, device=device) if hessian else None
        self.linear = linear

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.linear.smooth is not None:
            rows = rows * self.linear.smooth
        rows = rotate(rows, self.linear.rotation)
        self.observer.add(rows)
        if self.hessian is not None:
            self.hessian.addmm_(rows.T, rows)


def _capture(stream: Stream, block: Block, index: int, part: nn.Module, kind: str, watched: _Watch) -> None:
    if kind == "dt_proj":  # its weight is used without a call of the module
        width = part.get_parameter("dt_proj.weight").shape[1]

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            watched.add(output[..., :width])
            raise _Reached

        handle = part.get_submodule("x_proj").register_forward_hook(hook)
    else:

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            watched.add(inputs[0])
            raise _Reached

        handle = getattr(part, kind).register_forward_pre_hook(before)
    try:
        for position in range(len(stream.batches)):
            single = Stream.__new__(Stream)
            single.spec, single.device, single.batches = stream.spec, stream.device, [stream.batches[position]]
            try:
                next(single.run(block, index))
            except _Reached:
                continue
    finally:
        handle.remove()
