"""The numbers: observers, rounding, GPTQ, rotations and scans, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mamba_export.calibration import scans
from mamba_export.calibration.gptq import gptq, output_error
from mamba_export.calibration.observers import Observer, least_squares, percentile
from mamba_export.calibration.recipes import Weights
from mamba_export.calibration.rotation import block_size, hadamard, rotate
from mamba_export.calibration.rounding import round_to_nearest

from mamba_export.ops.causal_conv1d import causal_conv1d_reference
from mamba_export.ops.selective_scan import selective_scan_reference
from mamba_export.ops.ssd_scan import ssd_scan_reference


def test_an_observer_counts_the_same_whatever_the_pieces() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * 3
    whole, pieces = Observer(8), Observer(8)
    whole.add(x)
    for part in x.split(7):
        pieces.add(part)
    for name, value in whole.tensors().items():
        assert torch.allclose(value.double(), pieces.tensors()[name].double()), name
    assert pieces.tokens == 100 and torch.equal(whole.peak, x.abs().amax(0))
    again = Observer.restore(whole.tensors(), 100)
    assert torch.equal(again.counts, whole.counts)


def test_percentiles_are_right_to_a_bin() -> None:
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(1))
    observer = Observer(1)
    observer.add(x)
    for percent in (50.0, 99.0, 99.9):
        exact = float(np.percentile(x.abs().numpy(), percent))
        assert exact * 0.999 <= percentile(observer.counts, percent) <= exact * 2 ** (2 / 16)


def test_the_least_squares_range_beats_the_peak_where_there_is_an_outlier() -> None:
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(2))
    x[0] = 40.0
    observer = Observer(1)
    observer.add(x)

    def error(clip: float) -> float:
        step = clip / 127
        return float(((x / step).round().clamp(-128, 127) * step - x).square().mean())

    found = least_squares(observer.counts)
    assert found < 30 and error(found) < error(40.0)


@given(
    kind=st.sampled_from(["int4", "int8"]),
    group=st.sampled_from([0, 16, 32, 128]),
    columns=st.integers(1, 200),
    scales=st.sampled_from(["max", "mse"]),
    seed=st.integers(0, 999),
)
def test_rounding_to_nearest_is_off_by_half_a_step(kind: str, group: int, columns: int, scales: str, seed: int) -> None:
    w = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    matrix = round_to_nearest(w, Weights(kind, group, "rtn", "max"))
    assert matrix.values.shape == w.shape
    assert matrix.groups == -(-columns // matrix.group)
    step = matrix.scales.repeat_interleave(matrix.group, 1)[:, :columns]
    assert bool(((matrix.dequantize() - w).abs() <= 0.502 * step + 1e-6).all())
    searched = round_to_nearest(w, Weights(kind, group, "rtn", "mse"))
    assert (searched.dequantize() - w).square().sum() <= (matrix.dequantize() - w).square().sum() * 1.001


def test_rows_of_zeros_stay_zero() -> None:
    for kind in ("int4", "int8", "fp8"):
        matrix = round_to_nearest(torch.zeros(3, 40), Weights(kind, 0 if kind == "fp8" else 32, "rtn", "max"))
        assert not matrix.dequantize().any() and bool((matrix.scales > 0).all())


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(kind: str, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator)
    x = torch.randn(2000, 96, generator=generator) @ mix
    w = torch.randn(24, 96, generator=generator)
    h = x.T @ x
    plain = output_error(w, round_to_nearest(w, Weights(kind, group, "rtn", "mse")), h)
    one = output_error(w, gptq(w, h, Weights(kind, group, "gptq", "mse"), sweeps=0), h)
    best = output_error(w, gptq(w, h, Weights(kind, group, "gptq", "mse")), h)
    assert best <= one < plain


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    w, x = torch.randn(4, 32), torch.randn(100, 32)
    x[:, 5] = 0
    assert bool(torch.isfinite(gptq(w, x.T @ x, Weights("int4", 32, "gptq", "mse")).dequantize()).all())


@pytest.mark.parametrize("size", [2, 16, 64])
def test_a_rotation_is_orthogonal_and_its_own_inverse(size: int) -> None:
    h = hadamard(size)
    assert torch.allclose(h @ h.T, torch.eye(size), atol=1e-6) and torch.equal(h, h.T)
    x = torch.randn(3, 4 * size)
    assert torch.allclose(rotate(rotate(x, size), size), x, atol=1e-5)


def test_blocks_divide_the_dimension() -> None:
    assert block_size(768, 64) == 64
    assert block_size(768, 1024) == 256
    assert block_size(24, 64) == 8
    assert block_size(7, 64) == 0 and block_size(768, 0) == 0


def _mamba1(length: int, groups: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(length)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return (
        *(r(2, length, 12), r(2, length, 12), -torch.rand(12, 4, generator=g) * 5, r(2, length, groups, 4)),
        *(r(2, length, groups, 4), r(12), r(12), r(2, 12, 4), r(2, length, 12)),
    )


@pytest.mark.parametrize("length", [1, 15, 16, 70])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_fast_mamba1_scan_is_the_definition(length: int, groups: int) -> None:
    operands = _mamba1(length, groups)
    for found, wanted in zip(scans.selective_scan(*operands), selective_scan_reference(*operands), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 130])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_fast_mamba2_scan_is_the_definition(length: int, groups: int) -> None:
    g = torch.Generator().manual_seed(length)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    operands = (
        *(r(2, length, 4, 8), r(2, length, 4), -torch.rand(4, generator=g) * 5, r(2, length, groups, 16)),
        *(r(2, length, groups, 16), r(4), r(4), r(2, 4, 8, 16), None),
    )
    for found, wanted in zip(scans.ssd_scan(*operands), ssd_scan_reference(*operands), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_fast_convolution_is_the_definition() -> None:
    x, w, b, s = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 3)
    for found, wanted in zip(scans.causal_conv1d(x, w, b, s), causal_conv1d_reference(x, w, b, s), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_of_the_recurrence() -> None:
    def r(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(scans._Recurrence.apply, (r(2, 5, 3), r(2, 5, 3), r(2, 3)))
