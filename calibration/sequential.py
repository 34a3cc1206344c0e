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
from .promotion import WIDE, Candidate, promote
from .quantizer import linear_names, load_weight, set_embedding
from .recipes import Layer, Recipe
from .rotation import block_size, rotate
from .rounding import round_to_nearest
from .scans import fast_scans
from .sensitivity import Sensitivity, measure_sensitivity
from .simulation import SimulatedLinear
from .statistics import Statistics
from .tuning import tune

_TOKENS = 2048
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
    run = _Run(checkpoint, recipe, stats, dtype)
    with torch.inference_mode(False):  # tensors made under it have no gradients
        model = load_model(checkpoint, dtype, "fp32").to(device)
        if run.needs_sensitivity:
            run.sensitivities = measure_sensitivity(model, stats.ids, progress)
    with torch.inference_mode(), fast_scans(), progress.stage("quantize", total=len(model.backbone.layers) + 1) as tick:
        run.head(model)
        stream = Stream(model, stats.ids, device)
        for i, block in enumerate(model.backbone.layers):
            assert isinstance(block, Block)
            for kind in _ORDER:
                part = block.mixer if kind.endswith("proj") else block.mlp
                if part is not None and hasattr(part, kind):
                    run.layer(stream, block, i, part, kind)
            stream.advance(block, i)
            tick(1)
    quantized = run.quantized
    if recipe.promote.bits:
        quantized.promoted = promote(quantized, run.candidates, recipe.promote)
    if recipe.tune.steps:
        tune(checkpoint, quantized, stats.ids, recipe.tune, dtype, device, progress)
    return quantized


class _Run:
    """One quantization: what it works from, and what it has found so far."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, stats: Statistics, dtype: str) -> None:
        self.checkpoint, self.recipe, self.stats, self.dtype = checkpoint, recipe, stats, dtype
        self.quantized = QuantizedModel()
        self.sensitivities: dict[str, Sensitivity] = {}
        self.candidates: dict[str, Candidate] = {}

    @property
    def needs_sensitivity(self) -> bool:
        names = (name.removesuffix(".weight") for name in linear_names(self.checkpoint))
        return bool(self.recipe.promote.bits) or any(self.recipe.layer(n).weights.method == "yaqa" for n in names)

    def head(self, model: MambaLM) -> None:
        """The head first, so that a tied embedding is what the blocks see."""
        quantized, head = self.quantized, self.recipe.head
        if head.type != "float":
            source = EMBEDDING if self.checkpoint.spec.tie_embeddings else HEAD
            seen = self.stats.inputs["lm_head"]
            weight = load_weight(self.checkpoint, source)
            importance = (seen.squares / seen.tokens).float()
            quantized.linears[HEAD] = Linear(round_to_nearest(weight, head, self.dtype, importance))
        set_embedding(self.checkpoint, self.recipe, quantized, self.dtype)
        if quantized.embedding is not None:
            table = model.get_parameter(EMBEDDING)
            table.data = quantized.embedding.dequantize().to(table)

    def layer(self, stream: Stream, block: Block, index: int, part: nn.Module, kind: str) -> None:
        """Quantize one linear layer, and put its simulation in its place."""
        path = f"backbone.layers.{index}.{'mixer' if part is block.mixer else 'mlp'}.{kind}"
        how, side = self.recipe.layer(path), self.sensitivities.pop(path, None)
        if how.weights.type == "float" and how.inputs.type == "float":
            return
        module = getattr(part, kind)
        weight = load_weight(self.checkpoint, f"{path}.weight").to(module.weight.device).float()
        linear = Linear(Matrix("int8", weight, weight, 0))  # the matrix follows
        linear.rotation = block_size(weight.shape[1], how.rotate)
        linear.smooth = _smoothing(weight, how, self.stats, path)
        watched = _Watch(weight.shape[1], weight.device, how.weights.method != "rtn", linear, side)
        if how.inputs.type != "float" or watched.hessian is not None:
            _capture(stream, block, index, part, kind, watched)
        if how.inputs.type == "float" and how.smooth and watched.hessian is not None and not linear.rotation:
            if _norm_before(block, kind):  # elsewhere it would cost a multiplication
                linear.smooth = _equalizing(weight, watched.hessian, how, self.dtype)
            if linear.smooth is not None:
                watched.hessian *= linear.smooth[:, None] * linear.smooth
        if linear.smooth is not None:
            weight = weight / linear.smooth
            self.quantized.divided[f"{path}.weight"] = linear.smooth.cpu()
            _fold(block, index, kind, linear, self.quantized)
        weight = rotate(weight, linear.rotation)
        if how.inputs.type != "float":
            limit = INT8_MAX if how.inputs.type == "int8" else FP8_MAX
            clip = clip_value(watched.observer, how.inputs)
            linear.input = InputQuantization(how.inputs.type, max(clip, 1e-6) / limit)  # type: ignore[arg-type]
        if how.weights.type == "float":
            return
        linear.weight = self._round(weight, how, watched, side)
        self._consider(path, weight, linear.weight, how, watched, side)
        new = SimulatedLinear(linear, getattr(module, "bias", None), module.weight.dtype, module.weight.device)
        setattr(part, kind, new)
        linear.weight = linear.weight.cpu()
        linear.smooth = None if linear.smooth is None else linear.smooth.cpu()
        self.quantized.linears[f"{path}.weight"] = linear

    def _round(self, weight: Tensor, how: Layer, watched: _Watch, side: Sensitivity | None) -> Matrix:
        if watched.hessian is not None and how.weights.type in ("int4", "int8"):
            blocks = side.blocks if side is not None and side.scale and how.weights.method == "yaqa" else []
            return gptq(weight, watched.hessian, how.weights, self.dtype, outputs=blocks)
        importance = watched.observer.squares.float() if watched.observer.tokens else None
        return round_to_nearest(weight, how.weights, self.dtype, importance)

    def _consider(
        self, path: str, weight: Tensor, matrix: Matrix, how: Layer, watched: _Watch, side: Sensitivity | None
    ) -> None:
        """Keep what the matrix would be in int8, and what that would gain."""
        if not self.recipe.promote.bits or matrix.kind != "int4" or side is None or watched.hessian is None:
            return
        wide = round_to_nearest(weight, self.recipe.fit(WIDE, how.inputs), self.dtype)
        costs = [side.divergence(weight - m.dequantize(), watched.hessian) for m in (matrix, wide)]
        self.candidates[f"{path}.weight"] = Candidate(wide.cpu(), costs[0] - costs[1])


def _norm_before(block: Block, kind: str) -> tuple[str, nn.Module] | None:
    """Name in the block and module of the norm that can multiply the layer's input, where there is one."""
    if kind == "in_proj" and getattr(block.norm, "bias", None) is None:
        return "norm", block.norm
    norm = getattr(block.mixer, "norm", None)
    if kind == "out_proj" and isinstance(norm, GatedRMSNorm) and not block.mixer.spec.d_mlp:  # type: ignore[union-attr]
        return "mixer.norm", norm
    return None


def _fold(block: Block, index: int, kind: str, linear: Linear, quantized: QuantizedModel) -> None:
    """Let the norm before the layer do the multiplication, where there is one."""
    found = _norm_before(block, kind)
    if found is None:
        return
    place, norm = found
    assert linear.smooth is not None and isinstance(norm.weight, Tensor)
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

    def __init__(
        self, columns: int, device: torch.device, hessian: bool, linear: Linear, side: Sensitivity | None
    ) -> None:
        self.observer = Observer(columns, device)
        self.weights = None if side is None else side.tokens.to(device).flatten()
        self.hessian = torch.zeros(columns, columns, device=device) if hessian else None
        self.linear = linear

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.linear.smooth is not None:
            rows = rows * self.linear.smooth
        rows = rotate(rows, self.linear.rotation)
        self.observer.add(rows)
        if self.hessian is not None:
            weighted = rows
            if self.weights is not None:
                first = self.observer.tokens - rows.shape[0]
                weighted = rows * self.weights[first : first + rows.shape[0], None]
            self.hessian.addmm_(weighted.T, rows)


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
