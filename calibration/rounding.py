"""Round matrices to integers: the grid of each type, scales, and round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class Grid:
    """Where the values of a matrix may lie.

    Attributes:
        scales: float32 [rows, groups].
        zeros: float integers [rows, groups], the zero points; None for a grid around zero.
        group: columns that share them.
        low, high: least and largest stored integer.
    """

    scales: Tensor
    zeros: Tensor | None
    group: int
    low: int
    high: int

    def limits(self, columns: int) -> tuple[Tensor, Tensor]:
        """Least and largest integers relative to the zero points, float32 [rows, columns]."""
        zeros = torch.zeros_like(self.scales) if self.zeros is None else self.zeros
        return tuple(spread(bound - zeros, self.group, columns) for bound in (self.low, self.high))  # type: ignore[return-value]

    def matrix(self, kind: Kind, q: Tensor, scales: Tensor | None = None) -> Matrix:
        """Integers relative to the zero points → the matrix, with other scales if there are any."""
        zeros = None if self.zeros is None else self.zeros.to(torch.int8)
        return Matrix(kind, q.to(torch.int8), self.scales if scales is None else scales, self.group, zeros)


def spread(groups: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] → [rows, columns]."""
    return groups.repeat_interleave(group, 1)[:, :columns]


def choose_grid(weight: Tensor, scheme: Weights, dtype: str = "fp32", importance: Tensor | None = None) -> Grid:
    """Scales, and zero points where the scheme has them, of an integer matrix.

    Args:
        weight: float32 [rows, columns].
        scheme: type, group, and how scales are chosen.
        dtype: of the graph.
        importance: [columns], weight of a column's squared error in the search; all alike when None.
    """
    kind: Kind = scheme.type  # type: ignore[assignment]
    group = group_of(scheme, weight.shape[1])
    grouped = to_groups(weight.float(), group)
    low, high = LOW_HIGH[kind]
    most, least = grouped.amax(-1), grouped.amin(-1)
    cost = None if importance is None else to_groups(importance[None].float(), group)
    shrink = [1.0] if scheme.scales == "max" else _SHRINK if kind == "int4" else _SHRINK[:12]
    if scheme.zeros and kind == "int4":
        least = least.clamp(max=0)
        scales = (most.clamp(min=0) - least) / (high - low)
        grid = Grid(scales, torch.zeros_like(scales), group, low, high)
    else:
        # The grid of int4 is not symmetric: a row whose largest value is negative may use all of it.
        grid = Grid(torch.maximum(most / high, least / low), None, group, low, high)
    _search(grid, grouped, cost, least, shrink, dtype)
    return grid


def _search(grid: Grid, grouped: Tensor, cost: Tensor | None, least: Tensor, shrink: list[float], dtype: str) -> None:
    """From a grid that just covers the values to the one of least squared error; its zero points cover ``least``."""
    widest = torch.where(grid.scales > 0, grid.scales, torch.ones_like(grid.scales))
    grid.scales = store_scales(widest, dtype)
    best = torch.full_like(widest, torch.inf)
    for share in shrink:
        tried = store_scales(widest * share, dtype)
        shift = torch.zeros_like(tried)
        if grid.zeros is not None:
            shift = (grid.low - least * share / tried).round().clamp(grid.low, grid.high)
        q = (grouped / tried[..., None]).round_()
        q = q.clamp_((grid.low - shift)[..., None], (grid.high - shift)[..., None])
        error = q.mul_(tried[..., None]).sub_(grouped).square_()
        total = (error if cost is None else error * cost).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        grid.scales = torch.where(better, tried, grid.scales)
        if grid.zeros is not None:
            grid.zeros = torch.where(better, shift, grid.zeros)


def round_to_nearest(
    weight: Tensor, scheme: Weights, dtype: str = "fp32", importance: Tensor | None = None, rows: int = 4096
) -> Matrix:
    """Quantize a matrix, each value by itself.

    Args:
        weight: [rows, columns].
        scheme: of the recipe.
        dtype: of the graph, for the type of the scales.
        importance: see :func:`choose_grid`.
        rows: worked on at a time, so that a vocabulary's matrix takes little memory.
    """
    pieces = [_round_rows(part, scheme, dtype, importance) for part in weight.split(rows)]
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    return Matrix(
        pieces[0].kind,
        torch.cat([piece.values for piece in pieces]),
        torch.cat([piece.scales for piece in pieces]),
        pieces[0].group,
        torch.cat(zeros) if zeros else None,
    )


def _round_rows(weight: Tensor, scheme: Weights, dtype: str, importance: Tensor | None) -> Matrix:
    weight, columns = weight.float(), weight.shape[1]
    if scheme.type == "fp8":
        group = group_of(scheme, columns)
        scales = store_scales(to_groups(weight, group).abs().amax(-1) / FP8_MAX, dtype)
        values = (weight / spread(scales, group, columns)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return Matrix("fp8", values, scales, group)
    grid = choose_grid(weight, scheme, dtype, importance)
    q = (weight / spread(grid.scales, grid.group, columns)).round_().clamp_(*grid.limits(columns))
    return grid.matrix(scheme.type, q)  # type: ignore[arg-type]
