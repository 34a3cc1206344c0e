"""ssd_state_update on the GPU against one step of the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.ssd_state_update import ssd_state_update, ssd_state_update_tactics  # noqa: E402

from .test_ssd_scan import error, make, reference  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}

# batch, nheads, headdim, ngroups, d_state
SHAPES = [
    (1, 24, 64, 1, 128),
    (3, 5, 64, 1, 128),
    (2, 4, 80, 2, 64),
    (2, 3, 64, 1, 256),
    (5, 3, 33, 1, 16),
    (2, 3, 7, 3, 20),
    (65, 8, 64, 1, 128),
]


@pytest.mark.parametrize("state_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: Any, state_dtype: Any) -> None:
    batch, nheads, headdim, ngroups, d_state = shape
    inputs = make((batch, 1, nheads, headdim, ngroups, d_state), dtype, seed=headdim)
    inputs["z"] = torch.randn(inputs["x"].shape, device="cuda").to(dtype) if batch % 2 else None
    if batch == 3:
        inputs["D"] = torch.randn(nheads, headdim, device="cuda")
    state = inputs.pop("initial_state").to(state_dtype)
    expected, final = reference(**inputs, initial_state=state)
    for tactic in (-1, *ssd_state_update_tactics(*(inputs[name] for name in ("x", "dt", "A", "B", "C")), state)):
        out = torch.full(inputs["x"].shape, float("nan"), dtype=dtype, device="cuda")
        in_place, elsewhere = state.clone(), torch.full_like(state, float("nan"))
        ssd_state_update(**inputs, state=in_place, final_state=in_place, out=out, tactic=tactic)
        assert error(out, expected) < TOLERANCE[dtype], tactic
        assert error(in_place, final) < TOLERANCE[state_dtype], tactic
        kept = state.clone()
        ssd_state_update(**inputs, state=kept, final_state=elsewhere, tactic=tactic)
        assert torch.equal(elsewhere, in_place) and torch.equal(kept, state), tactic


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_steps(dtype: Any) -> None:
    inputs = make((3, 1, 8, 64, 1, 128), dtype, seed=7)
    spread = torch.rand(inputs["dt"].shape, device="cuda")
    inputs.update(dt=(10 ** (spread * 9.7 - 8)).to(dtype), dt_bias=None, dt_softplus=False)
    inputs["A"] = -(10 ** torch.linspace(-4, 3, 8, device="cuda"))
    state = inputs.pop("initial_state")
    for limits in ((0.0, float("inf")), (1e-3, 0.5)):
        expected, final = reference(**inputs, initial_state=state, dt_limit=limits)
        y, h = ssd_state_update(**inputs, state=state, dt_min=limits[0], dt_max=limits[1])
        assert error(y, expected) < TOLERANCE[dtype]
        assert error(h, final) < 2e-6


def test_bitwise_reproducible() -> None:
    inputs = make((65, 1, 24, 64, 1, 128), torch.bfloat16, seed=2)
    state = inputs.pop("initial_state")
    for tactic in (-1, 0, 1, 2, 3):
        first = ssd_state_update(**inputs, state=state, tactic=tactic)
        for _ in range(3):
            again = ssd_state_update(**inputs, state=state, tactic=tactic)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
