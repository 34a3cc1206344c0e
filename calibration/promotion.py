"""Spend bits where they count: the 4-bit matrices that cost the most per value become int8.

What a matrix costs is measured, on the calibration data alone: the KL divergence of the quantized model from the float
one, with and without this matrix in int8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.lm import MambaLM
from mamba_export.models.weights import load_model
from mamba_export.progress import Progress, silent
from mamba_export.quantized import Matrix, QuantizedModel
from mamba_export.states import state_table

from .quantizer import load_weight
from .recipes import CHANNEL, Promote, Weights
from .rotation import rotate
from .rounding import round_to_nearest
from .scans import fast_scans
from .simulation import SimulatedLinear, apply
from .statistics import Statistics

_LOGITS = 1 << 23  # values kept of the float model's predictions: 2,048 tokens of a vocabulary of 4,096
_WIDE = 8.0 + 16 / 128  # bits a value, with scales as the contrib ops store them
_SCHEME = Weights("int8", CHANNEL, "rtn", "mse")


def promote(
    checkpoint: Checkpoint,
    quantized: QuantizedModel,
    stats: Statistics,
    how: Promote,
    dtype: str = "fp32",
    device: str = "cpu",
    progress: Progress = silent,
) -> list[str]:
    """Raise matrices to int8 while the linear layers' average stays below ``how.bits``; returns their names."""
    names = [name for name, linear in quantized.linears.items() if linear.weight.kind == "int4"]
    layers = [name for name in quantized.linears if name.startswith("backbone.layers.")]
    total = sum(quantized.linears[name].weight.values.numel() for name in layers)
    used = sum(_bits(quantized, name) for name in layers)
    wide = {name: _int8(checkpoint, quantized, name, dtype) for name in names}
    extra = {name: _WIDE * matrix.values.numel() - _bits(quantized, name) for name, matrix in wide.items()}
    room = how.bits * total - used
    names = [name for name in names if extra[name] <= room]
    if not names:
        return []
    rows = max(1, _LOGITS // checkpoint.spec.vocab_size // stats.ids.shape[1])
    ids = stats.ids[:: max(1, stats.ids.shape[0] // rows)][:rows].to(device)
    gains: dict[str, float] = {}
    with torch.inference_mode(), fast_scans(), progress.stage("sensitivity", total=len(names)) as tick:
        wanted = _Run(load_model(checkpoint, dtype, "fp32").to(device), ids).predictions(0)
        run = _Run(apply(load_model(checkpoint, dtype, "fp32"), quantized).to(device), ids)
        before = _divergence(run.predictions(0), wanted)
        for name in names:
            layer = run.model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, SimulatedLinear)
            kept, layer.weight.data = layer.weight.data, wide[name].dequantize().to(layer.weight)
            gains[name] = before - _divergence(run.predictions(int(name.split(".")[2])), wanted)
            layer.weight.data = kept
            tick(1)
    chosen = []
    for name in sorted(names, key=lambda n: gains[n] / extra[n], reverse=True):
        if gains[name] > 0 and extra[name] <= room:
            room -= extra[name]
            quantized.linears[name].weight = wide[name]
            chosen.append(name)
    return chosen


def _bits(quantized: QuantizedModel, name: str) -> float:
    matrix = quantized.linears[name].weight
    if matrix.kind != "int4":
        return _WIDE * matrix.values.numel()
    return (4.0 * matrix.group + 16) * matrix.scales.numel()


def _int8(checkpoint: Checkpoint, quantized: QuantizedModel, name: str, dtype: str) -> Matrix:
    weight = load_weight(checkpoint, name).float()
    if name in quantized.divided:
        weight = weight / quantized.divided[name]
    return round_to_nearest(rotate(weight, quantized.linears[name].rotation), _SCHEME, dtype)


def _divergence(found: Tensor, wanted: Tensor) -> float:
    return float(F.kl_div(found, wanted, reduction="sum", log_target=True)) / found.shape[0]


class _Run:
    """Predictions of a model, from any block on: what enters the blocks is kept from the last full run."""

    def __init__(self, model: MambaLM, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.entries: list[tuple[Tensor, Tensor | None]] = []

    def predictions(self, first: int) -> Tensor:
        """Log probabilities [tokens, vocab]."""
        model, rows = self.model, self.ids.shape[0]
        if not self.entries:
            self.entries = [(model.backbone.embedding(self.ids), None)]
        x, residual = self.entries[first]
        states = [torch.zeros(rows, *s.shape, device=x.device) for s in state_table(model.spec, "fp32")]
        whole = len(self.entries) == 1
        for i in range(first, model.spec.n_layer):
            x, residual, *_ = model.backbone.layers[i](x, residual, states[2 * i], states[2 * i + 1], None)
            if whole:
                self.entries.append((x, residual))
        y, _ = model.backbone.norm_f(x, residual)
        return F.log_softmax(model.lm_head(y).flatten(0, 1), -1)
