"""Integer weights as the decode kernels read them: rows of integers, scales and zero points, in one tensor of bytes.

The layout is described in ``decode_stack.h``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .library import KernelError

if TYPE_CHECKING:
    from torch import Tensor

    from mamba_export.quantized import Matrix

__all__ = [
    "ORDER",
    "Format",
    "common_format",
    "format_by_length",
    "format_for",
    "format_of",
    "pack",
    "round_to",
    "row_bytes",
    "told_apart",
    "unpack",
    "width_step",
    "within",
]

_UNIT = 64
ORDER = {8: (0, 2, 1, 3, 4, 6, 5, 7), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
"""Of every eight neighbours, which lie where: by bits of an integer."""


@dataclass(frozen=True)
class Format:
    """Bits of an integer, values that share a scale (0: a row), and whether there are zero points."""

    bits: int
    group: int
    zeros: bool

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group) if self.group else 1


def width_step(bits: int) -> int:
    """Rows of integers of ``bits`` have multiples of so many values."""
    return 8 * _UNIT // bits


def format_for(kind: str, columns: int, group: int, zeros: bool = False) -> Format:
    """The format of rows of ``columns`` values of which ``group`` share a scale; an error says what kernels lack."""
    if kind not in ("int8", "int4"):
        raise KernelError(f"decode_stack has no {kind} weights", hint="quantize to int8 or int4")
    if kind == "int8" and zeros:
        raise KernelError("decode_stack has no zero points of int8")
    group = 0 if group >= columns else group
    if group and (group < 32 or group & (group - 1)):
        raise KernelError(
            f"decode_stack has no groups of {group} values", hint="a power of two from 32 on, or whole rows"
        )
    bits = 8 if kind == "int8" else 4
    if columns % width_step(bits):
        raise KernelError(
            f"decode_stack has no rows of {columns} {kind}", hint=f"widths are multiples of {width_step(bits)}"
        )
    return Format(bits, group, zeros)


def format_of(matrix: Matrix) -> Format:
    """The format of a quantized matrix; an error says what the kernels do not have."""
    return format_for(matrix.kind, matrix.columns, matrix.group, matrix.zeros is not None)


def common_format(formats: Iterable[Format]) -> Format:
    """The format of a model with such matrices: int4 if any is, in the smallest groups that any has.

    Rows take their scales repeated where their own groups are larger: int8 keeps its bits in such a model.
    """
    found = set(formats)
    group = min((form.group for form in found if form.group), default=0)
    return Format(min(form.bits for form in found), group, any(form.zeros for form in found))


def row_bytes(form: Format, columns: int) -> int:
    """Bytes of a packed row."""
    used = columns * form.bits // 8 + 2 * form.groups(columns) * (1 + form.zeros)
    return (-(-used // _UNIT) | 1) * _UNIT  # an odd number of units


def within(form: Format, bits: int) -> Format:
    """The format of the matrices of ``bits`` in a model of format ``form``."""
    return Format(bits, form.group, form.zeros and bits == 4)


def told_apart(form: Format, columns: int) -> bool:
    """Whether the length of a row says if its integers have 8 bits, in a model of format ``form``."""
    return form.bits == 8 or row_bytes(form, columns) != row_bytes(within(form, 8), columns)


def format_by_length(form: Format, columns: int, length: int) -> Format:
    """The format of a matrix whose rows have ``length`` bytes, in a model of format ``form``."""
    wide = within(form, 8)
    return wide if length == row_bytes(wide, columns) != row_bytes(form, columns) else form


def pack(matrix: Matrix, dtype: Any, device: Any = None, form: Format | None = None) -> Tensor:
    """uint8 [rows, bytes of a row]; scales and zero points become ``dtype``.

    Args:
        matrix: int8 or int4.
        dtype: of the model, float16 or bfloat16.
        device: of the result.
        form: of the model, where other matrices have smaller groups or zero points; the matrix's own when None.
    """
    import torch

    own = format_of(matrix)
    form = own if form is None else within(form, own.bits)
    group, columns = form.group or matrix.columns, matrix.columns
    source = torch.arange(form.groups(columns), device=device) * group // (own.group or columns)
    stored, scales = matrix.values.to(device), matrix.scales.to(device, dtype)[:, source]
    parts = [scales]
    if form.bits == 4:
        zeros = torch.full_like(scales, 8)
        if matrix.zeros is not None:
            zeros = matrix.zeros.to(scales)[:, source] + 8
        stored = stored + zeros.to(torch.int8).repeat_interleave(group, 1)[:, :columns]
        parts += [zeros] * form.zeros
    subs = 16 // form.bits  # 32 values each, in the 64 bytes of four lanes
    stored = stored.reshape(len(stored), -1, subs, 4, 8).transpose(2, 3)[..., ORDER[form.bits]].flatten(1)
    if form.bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    row = torch.cat([part.contiguous().view(torch.uint8) for part in (stored, *parts)], 1)
    return torch.nn.functional.pad(row, (0, row_bytes(form, columns) - row.shape[1]))


def unpack(packed: Tensor, form: Format, columns: int, dtype: Any) -> Tensor:
    """What packed rows stand for: uint8 [rows, bytes of a row], scales being ``dtype`` → ``dtype`` [rows, columns]."""
    import torch

    integers, groups, subs = columns * form.bits // 8, form.groups(columns), 16 // form.bits
    stored = packed[:, :integers]
    if form.bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], 2).flatten(1)
    inverse = sorted(range(8), key=lambda place: ORDER[form.bits][place])
    values = stored.reshape(len(packed), -1, 4, subs, 8)[..., inverse].transpose(2, 3).flatten(1)
    floats = packed[:, integers : integers + 2 * groups * (1 + form.zeros)].contiguous().view(dtype).float()
    q = values.contiguous().view(torch.int8).float() if form.bits == 8 else values.float() - 8
    if form.zeros:
        q += 8 - floats[:, groups:].repeat_interleave(form.group or columns, 1)[:, :columns]
    return (q * floats[:, :groups].repeat_interleave(form.group or columns, 1)[:, :columns]).to(dtype)


def round_to(weight: Tensor, form: Format) -> Matrix:
    """A matrix rounded to nearest, for tests and benchmarks; scales are of the weight's type."""
    from mamba_export.calibration.recipes import Weights
    from mamba_export.calibration.rounding import round_to_nearest

    scheme = Weights(type=f"int{form.bits}", group=form.group, zeros=form.zeros)
    dtype = "bf16" if str(weight.dtype) == "torch.bfloat16" else "fp16"
    rounded: Matrix = round_to_nearest(weight.float(), scheme, dtype)
    return rounded
