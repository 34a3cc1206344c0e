"""Distillation after rounding: scales, norms and the choice of integers are adjusted to what the float model predicts.

The student starts as the quantized model. Its float parameters are trained by Adam on the KL divergence from the
checkpoint's predictions, over the calibration windows; integers change where a weight drifts over the edge of its step
(straight-through estimator, LSQ's gradient for the scales: Esser et al. 2019). Nothing but calibration data is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_export.checkpoint import Checkpoint
from mamba_export.models.lm import MambaLM
from mamba_export.models.weights import load_model
from mamba_export.progress import Progress, silent
from mamba_export.quantized import EMBEDDING, HEAD, Matrix, QuantizedModel
from mamba_export.states import state_table

from .quantizer import load_weight
from .recipes import Tune
from .rotation import rotate
from .rounding import LOW_HIGH, spread, store_scales
from .scans import fast_scans
from .simulation import SimulatedLinear, apply

_FLOATS = (".norm.weight", "norm_f.weight", ".D", ".dt_bias", "dt_proj.bias", "conv1d.weight", "conv1d.bias")


class _Matrix(nn.Module):
    """A quantized matrix whose values and scales can be trained.

    ``offset`` is where a weight stands relative to its integer, in steps: within half a step nothing changes.
    """

    low: Tensor
    high: Tensor

    def __init__(self, matrix: Matrix, original: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.kind, self.group, self.columns = matrix.kind, matrix.group, matrix.columns
        low, high = LOW_HIGH[matrix.kind]
        self.zeros = None if matrix.zeros is None else matrix.zeros.to(device)
        shift = 0 if self.zeros is None else self._spread(self.zeros)
        self.register_buffer("low", torch.zeros_like(matrix.values, dtype=torch.float32, device=device) + low - shift)
        self.register_buffer("high", self.low + (high - low))
        self.scales = nn.Parameter(matrix.scales.to(device).log())
        values = matrix.values.to(device).float()
        if original is not None:
            spread = self._spread(matrix.scales.to(device))
            values = values + (original.to(device).float() / spread - values).clamp(-0.45, 0.45)
        self.values = nn.Parameter(values, requires_grad=original is not None)

    def _spread(self, scales: Tensor) -> Tensor:
        return spread(scales, self.group, self.columns)

    def forward(self) -> Tensor:
        clamped = self.values.clamp(self.low, self.high)
        integers = clamped + (clamped.round() - clamped).detach()
        return integers * self._spread(self.scales.exp())

    def matrix(self, dtype: str) -> Matrix:
        scales = store_scales(self.scales.detach().exp(), dtype).cpu()
        values = self.values.detach().clamp(self.low, self.high).round().to(torch.int8).cpu()
        return Matrix(self.kind, values, scales, self.group, None if self.zeros is None else self.zeros.cpu())


class _Linear(nn.Module):
    def __init__(self, simulated: SimulatedLinear, matrix: _Matrix) -> None:
        super().__init__()
        self.matrix, self.simulated = matrix, simulated
        self.bias = simulated.bias

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.matrix()
        return found

    def forward(self, x: Tensor) -> Tensor:
        s = self.simulated
        if s.smooth is not None:
            x = x * s.smooth
        x = rotate(x, s.rotation)
        if s.input is not None:
            limit = 128 * s.input.scale
            clamped = x.clamp(-limit, limit)
            rounded = (clamped / s.input.scale).round().clamp(-128, 127) * s.input.scale
            x = clamped + (rounded - clamped).detach()
        return F.linear(x, self.weight, self.bias)


@dataclass
class _Student:
    model: MambaLM
    matrices: dict[str, _Matrix]
    floats: dict[str, nn.Parameter]


def tune(
    checkpoint: Checkpoint,
    quantized: QuantizedModel,
    ids: Tensor,
    how: Tune,
    dtype: str = "fp32",
    device: str = "cpu",
    progress: Progress = silent,
) -> list[float]:
    """Train; ``quantized`` is changed in place.

    Returns:
        the loss of every step.
    """
    place = torch.device(device)
    teacher = load_model(checkpoint, dtype, "fp32").to(place)
    student = _student(checkpoint, quantized, dtype, place, how.integers)
    scales = [m.scales for m in student.matrices.values()]
    values = [m.values for m in student.matrices.values() if m.values.requires_grad]
    groups = [
        {"params": scales, "rate": how.rate},
        {"params": list(student.floats.values()), "rate": how.rate},
        {"params": values, "rate": how.integers},
    ]
    optimizer = torch.optim.Adam([{"params": g["params"], "lr": 0.0} for g in groups], betas=(0.9, 0.99))
    losses = []
    with fast_scans(), progress.stage("tune", total=how.steps) as tick:
        for step, batch in zip(range(how.steps), _batches(ids, how.rows), strict=False):
            for group, named in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = named["rate"] * _schedule(step, how.steps)  # type: ignore[operator]
            with torch.no_grad():
                wanted = _logits(teacher, batch.to(place))
            found = _logits(student.model, batch.to(place))
            loss = F.kl_div(F.log_softmax(found, -1), F.log_softmax(wanted, -1), reduction="sum", log_target=True)
            loss = loss / batch.numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            tick(1)
    _keep(student, quantized, dtype)
    return losses


def _schedule(step: int, steps: int) -> float:
    """A short warm-up, then a cosine to zero."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _batches(ids: Tensor, rows: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from (ids[part] for part in torch.randperm(ids.shape[0], generator=generator).split(rows))


def _logits(model: MambaLM, ids: Tensor) -> Tensor:
    states = [torch.zeros(ids.shape[0], *s.shape, device=ids.device) for s in state_table(model.spec, "fp32")]
    logits: Tensor = model(ids, states)[0]
    return logits


def _student(
    checkpoint: Checkpoint, quantized: QuantizedModel, dtype: str, device: torch.device, integers: float
) -> _Student:
    model = apply(load_model(checkpoint, dtype, "fp32"), quantized).to(device)
    matrices: dict[str, _Matrix] = {}
    for name, linear in quantized.linears.items():
        path = name.removesuffix(".weight")
        parent, simulated = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
        assert isinstance(simulated, SimulatedLinear)
        if simulated.smooth is not None:
            simulated.smooth = simulated.smooth.to(device)
        original = None
        if integers and linear.weight.kind == "int4":
            source = EMBEDDING if name == HEAD and checkpoint.spec.tie_embeddings else name
            original = load_weight(checkpoint, source).float()
            if name in quantized.divided:
                original = original / quantized.divided[name]
            original = rotate(original, linear.rotation)
        matrices[name] = _Matrix(linear.weight, original, device)
        setattr(parent, path.rpartition(".")[2], _Linear(simulated, matrices[name]))
    floats = {n: p for n, p in model.named_parameters() if n.endswith(_FLOATS)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [*floats.values(), *(m.scales for m in matrices.values())]
    for parameter in [*trained, *(m.values for m in matrices.values() if integers and m.kind == "int4")]:
        parameter.requires_grad_(True)
    shared = HEAD in matrices and quantized.embedding is quantized.linears[HEAD].weight
    if shared:
        model.backbone.embedding = _Lookup(matrices[HEAD])  # type: ignore[assignment]
    return _Student(model, matrices, floats)


class _Lookup(nn.Module):
    def __init__(self, matrix: _Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.matrix())


def _keep(student: _Student, quantized: QuantizedModel, dtype: str) -> None:
    shared = HEAD in quantized.linears and quantized.embedding is quantized.linears[HEAD].weight
    for name, matrix in student.matrices.items():
        quantized.linears[name].weight = matrix.matrix(dtype)
    if shared:
        quantized.embedding = quantized.linears[HEAD].weight
    for name, parameter in student.floats.items():
        quantized.floats[name] = parameter.detach().cpu()
