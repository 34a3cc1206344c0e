"""Round matrices to integers: the grid of each type, scales, and round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_export.quantized import FP8_MAX, Kind, Matrix

from .recipes import CHANNEL, Weights

LOW_HIGH: dict[Kind, tuple[int, int]] = {"int4": (-8, 7), "int8": (-127, 127)}
SCALE_DTYPES = {"fp32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By dtype of the graph: what scales are stored in, also where the graph computes in float32."""
_SHRINK = torch.linspace(1.0, 0.5, 26).tolist()


def group_of(scheme: Weights, columns: int) -> int:
    """Columns that share a scale: at most what the scheme says, less where that saves padding.

    A group wider than the matrix becomes the power of two that holds a row.
    """
    if scheme.group == CHANNEL:
        return columns
    group = min(scheme.group, max(16, 1 << (columns - 1).bit_length()))
    while group > 16 and -columns % (group // 2) < -columns % group:
        group //= 2
    return group


def to_groups(weight: Tensor, group: int) -> Tensor:
    """[rows, columns] → [rows, groups, group], the last group padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % group
    return torch.nn.functional.pad(weight, (0, padding)).reshape(rows, -1, group)


def store_scales(scales: Tensor, dtype: str) -> Tensor:
    """The scales as the graph will hold them, never zero."""
    stored = SCALE_DTYPES[dtype]
    smallest = torch.finfo(torch.float16).tiny / 64
    return scales.float().clamp(min=smallest).to(stored).float()


def choose_scales(
    weight: Tensor, scheme: Weights, dtype: str = "fp32", importance: Tensor | None = None
) -> tuple[Tensor, int]:
    """Scales of an integer matrix.

    Args:
        weight: float32 [rows, columns].
        scheme: type, group, and how scales are chosen.
        dtype: of the graph.
        importance: [columns], weight of a column's squared error in the search; all alike when None.

    Returns:
        float32 [rows, groups] and the group's width.
    """
    kind: Kind = scheme.type  # type: ignore[assignment]
    group = group_of(scheme, weight.shape[1])
    grouped = to_groups(weight.float(), group)
    peak = grouped.abs().amax(-1)
    if kind == "fp8":
        return store_scales(peak / FP8_MAX, dtype), group
    low, high = LOW_HIGH[kind]
    # The grid of int4 is not symmetric: a row whose largest value is negative may use all of it.
    scales = torch.maximum(grouped.amax(-1) / high, grouped.amin(-1) / low)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    if scheme.scales == "max":
        return store_scales(scales, dtype), group
    cost = None if importance is None else to_groups(importance[None].float(), group)
    best, least = store_scales(scales, dtype), torch.full_like(scales, torch.inf)
    for shrink in _SHRINK if kind == "int4" else _SHRINK[:12]:
        tried = store_scales(scales * shrink, dtype)
        error = (grouped / tried[..., None]).round_().clamp_(low, high).mul_(tried[..., None]).sub_(grouped).square_()
        total = (error if cost is None else error * cost).sum(-1)
        better = total < least
        best, least = torch.where(better, tried, best), torch.where(better, total, least)
    return best, group


def round_to_nearest(
    weight: Tensor, scheme: Weights, dtype: str = "fp32", importance: Tensor | None = None, rows: int = 4096
) -> Matrix:
    """Quantize a matrix, each value by itself.

    Args:
        weight: [rows, columns].
        scheme: of the recipe.
        dtype: of the graph, for the type of the scales.
        importance: see :func:`choose_scales`.
        rows: worked on at a time, so that a vocabulary's matrix takes little memory.
    """
    pieces = [_round_rows(part, scheme, dtype, importance) for part in weight.split(rows)]
    values, scales = torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])
    return Matrix(scheme.type, values, scales, group_of(scheme, weight.shape[1]))  # type: ignore[arg-type]


def _round_rows(weight: Tensor, scheme: Weights, dtype: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scales, group = choose_scales(weight, scheme, dtype, importance)
    spread = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
    if scheme.type == "fp8":
        return (weight / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales
    low, high = LOW_HIGH[scheme.type]  # type: ignore[index]
    return (weight / spread).round_().clamp_(low, high).to(torch.int8), scales
