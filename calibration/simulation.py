"""The quantized model in torch: dequantized weights, and inputs rounded as the graphs round them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.lm import MambaLM
from mamba_export.models.weights import load_model
from mamba_export.progress import Progress, silent
from mamba_export.quantized import EMBEDDING, FP8_MAX, HEAD, InputQuantization, Linear, QuantizedModel

from .recipes import Recipe
from .rotation import rotate
from .statistics import Statistics


def fake_quantize(x: Tensor, how: InputQuantization) -> Tensor:
    """Round to the grid and back."""
    scaled = x / how.scale
    if how.kind == "fp8":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * how.scale
    return scaled.round().clamp(-128, 127) * how.scale


class SimulatedLinear(nn.Module):
    """Stands where an nn.Linear was. ``weight`` is the dequantized matrix, as the graph multiplies with it."""

    def __init__(self, linear: Linear, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.dequantize().to(device, dtype), requires_grad=False)
        self.bias = bias
        self.input, self.rotation = linear.input, linear.rotation
        self.smooth = None if linear.smooth is None else linear.smooth.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.smooth is not None:
            x = x * self.smooth
        x = rotate(x, self.rotation)
        if self.input is not None:
            x = fake_quantize(x, self.input)
        return F.linear(x, self.weight, self.bias)


def apply(model: MambaLM, quantized: QuantizedModel) -> MambaLM:
    """Put the quantized parts into a torch model with the checkpoint's weights; changed in place and returned."""
    for name, value in quantized.floats.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)
    tied = quantized.embedding
    for name, linear in quantized.linears.items():
        path = name.removesuffix(".weight")
        parent = model.get_submodule(path.rpartition(".")[0])
        old = model.get_submodule(path)
        reference = old.weight
        assert isinstance(reference, Tensor)
        bias = getattr(old, "bias", None)
        new = SimulatedLinear(linear, bias, reference.dtype, reference.device)
        setattr(parent, path.rpartition(".")[2], new)
        if name == HEAD and tied is linear.weight:
            model.backbone.embedding.weight = new.weight
    if tied is not None and (HEAD not in quantized.linears or tied is not quantized.linears[HEAD].weight):
        table = model.get_parameter(EMBEDDING)
        model.backbone.embedding.weight = nn.Parameter(tied.dequantize().to(table), requires_grad=False)
    return model


def simulate(
    checkpoint: Checkpoint,
    recipe: str | Recipe | QuantizedModel,
    stats: Statistics | None = None,
    *,
    dtype: str = "fp32",
    blocks: bool = False,
    progress: Progress = silent,
) -> MambaLM:
    """The torch model (prefill, logits of all positions, float32 arithmetic) that computes what the bundle computes.

    Args:
        checkpoint: an open checkpoint.
        recipe: a recipe, which is carried out first, or what carrying one out gave.
        stats: of a calibration, for recipes that need one.
        dtype: of the bundle's other weights.
        blocks: as for :func:`~.quantizer.quantize_model`.
        progress: gets told what is being done.
    """
    if not isinstance(recipe, QuantizedModel):
        from .quantizer import quantize_model

        recipe = quantize_model(checkpoint, recipe, stats, dtype=dtype, blocks=blocks, progress=progress)
    return apply(load_model(checkpoint, dtype, "fp32"), recipe)
