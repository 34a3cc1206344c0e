"""Packed integer weights against the words of decode_stack.h, byte by byte."""

from __future__ import annotations

import pytest
import torch

from kernels.library import KernelError
from kernels.packed_weights import (
    Format,
    common_format,
    format_by_length,
    format_of,
    pack,
    round_to,
    row_bytes,
    told_apart,
    unpack,
    within,
)
from mamba_export.quantized import Matrix

ORDER8, ORDER4 = (0, 2, 1, 3, 4, 6, 5, 7), (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(row: list[int], columns: int, bits: int) -> list[int]:
    """The integers of a row, as the header describes them: unsigned ones of 4 bits."""
    values = [0] * columns
    for at in range(columns * bits // 8):
        unit, lane, i = at // 64, at % 64 // 16, at % 16
        if bits == 8:
            place = unit * 64 + i // 8 * 32 + lane * 8 + ORDER8[i % 8]
            values[place] = row[at] - 256 * (row[at] > 127)
            continue
        for high in range(2):
            nibble = i % 4 * 2 + high
            place = unit * 128 + i // 4 * 32 + lane * 8 + ORDER4[nibble]
            values[place] = row[at] >> 4 * high & 15
    return values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "form", [Format(8, 0, False), Format(8, 32, False), Format(4, 0, False), Format(4, 64, False), Format(4, 32, True)]
)
def test_a_row_is_what_the_header_says(form: Format, dtype: torch.dtype) -> None:
    columns, rows = 256, 5
    matrix = round_to(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype), form)
    assert format_of(matrix) == form
    packed = pack(matrix, dtype)
    assert packed.shape[1] % 128 == 64 and packed.shape[1] == row_bytes(form, columns)
    assert torch.equal(unpack(packed, form, columns, dtype), matrix.dequantize().to(dtype))
    group = form.group or columns
    groups, at = columns // group, columns * form.bits // 8
    for row, bytes_of_row in enumerate(packed):
        q = torch.tensor(unpacked(bytes_of_row.tolist(), columns, form.bits))
        scales = bytes_of_row[at : at + 2 * groups].view(dtype).double()
        zeros = torch.full((groups,), 0.0 if form.bits == 8 else 8.0, dtype=torch.float64)
        if form.zeros:
            zeros = bytes_of_row[at + 2 * groups : at + 4 * groups].view(dtype).double()
            assert zeros.min() >= 0 and zeros.max() <= 15
        found = (q.reshape(groups, group) - zeros[:, None]) * scales[:, None]
        assert torch.equal(found.flatten(), matrix.values[row].double() * scales.repeat_interleave(group))
        assert torch.equal(scales.float(), matrix.scales[row])
        assert not bytes_of_row[at + (4 if form.zeros else 2) * groups :].any()


def test_matrices_keep_their_values_in_the_format_of_a_model() -> None:
    """int8 among int4, larger groups among smaller ones, no zero points among some."""
    wide, finer, zeros = Format(8, 0, False), Format(4, 64, False), Format(4, 128, True)
    model = common_format([wide, finer, zeros])
    assert model == Format(4, 64, True) and common_format([wide, wide]) == wide
    for form in (wide, finer, zeros, Format(4, 0, False)):
        matrix = round_to(torch.randn(3, 384, generator=torch.Generator().manual_seed(2)).half(), form)
        packed, own = pack(matrix, torch.float16, form=model), within(model, form.bits)
        assert packed.shape[1] == row_bytes(own, 384) and own == format_by_length(model, 384, packed.shape[1])
        assert torch.equal(unpack(packed, own, 384, torch.float16), matrix.dequantize().half())
    assert told_apart(model, 384) and not told_apart(Format(4, 128, False), 128) and told_apart(wide, 128)


def test_what_kernels_do_not_have() -> None:
    values, scales = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 4)
    for matrix in (
        Matrix("int8", values, scales, 16),  # groups too small
        Matrix("int4", values, scales[:, :2], 32),  # half of 64 bytes
        Matrix("int8", values, scales[:, :2], 32, torch.zeros(2, 2, dtype=torch.int8)),  # zero points
        Matrix("fp8", values, scales[:, :1], 64),
    ):
        with pytest.raises(KernelError):
            format_of(matrix)


@pytest.mark.parametrize(
    ("columns", "int8", "int4"), [(768, 0.542, 0.292), (1536, 0.521, 0.271), (2560, 0.513, 0.263), (5120, 0.506, 0.269)]
)
def test_rows_are_about_as_small_as_their_integers(columns: int, int8: float, int4: float) -> None:
    """Shares of float16, as docs/quantization.md has them; int4 with a scale every 128 values."""
    assert row_bytes(Format(8, 0, False), columns) / (2 * columns) == pytest.approx(int8, abs=6e-4)
    assert row_bytes(Format(4, 128, False), columns) / (2 * columns) == pytest.approx(int4, abs=6e-4)
