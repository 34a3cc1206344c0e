"""Integer weights as the decode kernels read them: rows of integers, scales and zero points, in one tensor of bytes.

The layout is described in ``decode_stack.h``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .library import KernelError

if TYPE_CHECKING:
    from torch import Tensor

    from mamba_export.quantized import Matrix

__all__ = ["Format", "common_format", "format_of", "pack", "round_to"]

_UNIT = 64
_ORDER = {8: (0, 2, 1, 3, 4, 6, 5, 7), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
"""Of every eight neighbours, which lie where."""


@dataclass(frozen=True)
class Format:
    """Bits of an integer, values that share a scale (0: a row), and whether there are zero points."""

    bits: int
    group: int
    zeros: bool


def format_of(matrix: Matrix) -> Format:
    """The format of a quantized matrix; an error says what the kernels do not have."""
    if matrix.kind not in ("int8", "int4"):
        raise KernelError(f"decode_stack has no {matrix.kind} weights", hint="quantize to int8 or int4")
    if matrix.kind == "int8" and matrix.zeros is not None:
        raise KernelError("decode_stack has no zero points of int8")
    group = 0 if matrix.group >= matrix.columns else matrix.group
    if group and (group < 32 or group & (group - 1)):
        raise KernelError(
            f"decode_stack has no groups of {group} values", hint="a power of two from 32 on, or whole rows"
        )
    bits = 8 if matrix.kind == "int8" else 4
    if matrix.columns * bits % (8 * _UNIT):
        raise KernelError(f"decode_stack has no rows of {matrix.columns} {matrix.kind}")
    return Format(bits, group, matrix.zeros is not None)


def common_format(matrices: Collection[Matrix]) -> Format:
    """The one format of all matrices: where it has groups, narrow matrices may have a single one."""
    formats = {format_of(matrix) for matrix in matrices}
    group = max(form.group for form in formats)
    wide = any(format_of(m).group == 0 and m.columns > group for m in matrices)
    if len({(f.bits, f.zeros) for f in formats}) > 1 or len({f.group for f in formats} - {0}) > 1 or (group and wide):
        raise KernelError("decode_stack: quantized matrices have different formats", hint="give all the same")
    return next(form for form in formats if form.group == group)


def pack(matrix: Matrix, dtype: Any, device: Any = None) -> Tensor:
    """uint8 [rows, bytes of a row]; scales and zero points become ``dtype``."""
    import torch

    form = format_of(matrix)
    stored, scales = matrix.values.to(device), matrix.scales.to(device, dtype)
    parts = [scales]
    if form.bits == 4:
        zeros = torch.full_like(scales, 8) if matrix.zeros is None else matrix.zeros.to(scales) + 8
        stored = stored + zeros.to(torch.int8).repeat_interleave(matrix.group, 1)[:, : matrix.columns]
        parts += [zeros] * form.zeros
    subs = 16 // form.bits  # 32 values each, in the 64 bytes of four lanes
    stored = stored.reshape(len(stored), -1, subs, 4, 8).transpose(2, 3)[..., _ORDER[form.bits]].flatten(1)
    if form.bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    row = torch.cat([part.contiguous().view(torch.uint8) for part in (stored, *parts)], 1)
    units = -(-row.shape[1] // _UNIT) | 1  # an odd number
    return torch.nn.functional.pad(row, (0, units * _UNIT - row.shape[1]))


def round_to(weight: Tensor, form: Format) -> Matrix:
    """A matrix rounded to nearest, for tests and benchmarks; scales are of the weight's type."""
    from mamba_export.calibration.recipes import Weights
    from mamba_export.calibration.rounding import round_to_nearest

    scheme = Weights(type=f"int{form.bits}", group=form.group, zeros=form.zeros)
    dtype = "bf16" if str(weight.dtype) == "torch.bfloat16" else "fp16"
    rounded: Matrix = round_to_nearest(weight.float(), scheme, dtype)
    return rounded
