"""Scans in Triton against float64 at sizes of models: every number of pieces, and what is hard for them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels.triton.selective_scan import selective_scan  # noqa: E402
from kernels.triton.ssd_scan import ssd_scan  # noqa: E402

from . import test_selective_scan as mamba1  # noqa: E402
from . import test_ssd_scan as mamba2  # noqa: E402

TOLERANCE = {torch.float32: 3e-6, torch.float16: 7e-4, torch.bfloat16: 5e-3}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
PIECES = (0, 1, 3)


def ssd(inputs: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    inputs = {**inputs, "state": inputs["initial_state"]}
    del inputs["initial_state"]
    return ssd_scan(**inputs, **more)


@by_dtype
@pytest.mark.parametrize(
    "shape", [(2, 333, 96, 16, 2), (1, 1, 64, 16, 1), (1, 700, 1536, 16, 1), (2, 90, 48, 64, 1)], ids=str
)
def test_scan(shape: tuple[int, ...], dtype: Any) -> None:
    for reverse in (False, True):
        inputs = mamba1.make(shape, dtype, seed=shape[1])
        lens = torch.randint(1, shape[1] + 1, (shape[0],), device="cuda", dtype=torch.int32)
        expected, final = mamba1.reference(**inputs, seq_lens=lens, reverse=reverse)
        for pieces in PIECES:
            y, h = selective_scan(**inputs, seq_lens=lens, reverse=reverse, pieces=pieces)
            assert mamba1.error(y, expected) < TOLERANCE[dtype], pieces
            assert mamba1.error(h, final) < 1e-5, pieces


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, -18.0), (1e3, 3.0), (1e3, 50.0), (1.0, 50.0)])
def test_scan_of_extreme_steps(scale: float, shift: float) -> None:
    inputs = mamba1.make((1, 200, 64, 16, 1), torch.float32, seed=3, scale=scale, shift=shift)
    expected, final = mamba1.reference(**inputs, seq_lens=None, reverse=False)
    for pieces in PIECES:
        y, h = selective_scan(**inputs, pieces=pieces)
        assert mamba1.error(y, expected) < 5e-6, pieces
        assert mamba1.error(h, final) < 1e-5, pieces


@by_dtype
@pytest.mark.parametrize("shape", [mamba2.SHAPES[i] for i in (0, 1, 2, 5, 7, 8, 11)], ids=str)
def test_ssd(shape: tuple[int, ...], dtype: Any) -> None:
    inputs = mamba2.make(shape, dtype, seed=shape[1])
    if shape[1] % 2:
        inputs["z"] = torch.randn(inputs["x"].shape, device="cuda").to(dtype)
        inputs["D"] = torch.randn(shape[2], shape[3], device="cuda")
    expected, final = mamba2.reference(**inputs)
    for pieces in PIECES:
        y, h = ssd(inputs, pieces=pieces)
        assert mamba2.error(y, expected) < TOLERANCE[dtype], pieces
        assert mamba2.error(h, final) < TOLERANCE[dtype], pieces


@by_dtype
def test_ssd_of_extreme_steps(dtype: Any) -> None:
    inputs = mamba2.make((1, 140, 8, 64, 1, 128), dtype, seed=7)
    spread = torch.rand(inputs["dt"].shape, device="cuda")
    inputs.update(dt=(10 ** (spread * 9.7 - 8)).to(dtype), dt_bias=torch.zeros(8, device="cuda"), dt_softplus=False)
    inputs["A"] = -(10 ** torch.linspace(-4, 3, 8, device="cuda"))
    expected, final = mamba2.reference(**inputs)
    for pieces in PIECES:
        y, h = ssd(inputs, pieces=pieces)
        assert mamba2.error(y, expected) < TOLERANCE[dtype], pieces
        assert mamba2.error(h, final) < TOLERANCE[dtype], pieces


def test_bitwise_reproducible() -> None:
    one, two = (
        mamba1.make((2, 300, 128, 16, 1), torch.bfloat16, seed=2),
        mamba2.make((1, 200, 4, 64, 1, 128), torch.bfloat16, seed=2),
    )
    for run, inputs in ((selective_scan, one), (ssd, two)):
        first = run(**inputs) if run is selective_scan else run(inputs)
        again = run(**inputs) if run is selective_scan else run(inputs)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
