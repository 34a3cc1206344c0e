"""ssd_state_update on the GPU against one step of the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.library import KernelError  # noqa: E402
from kernels.ssd_state_update import ssd_state_update  # noqa: E402

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
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") and v is not None else v for k, v in inputs.items()}
    for tactic in (-1, 0, 1, 2, 3, 4):
        out = torch.full((batch, nheads, headdim), float("nan"), dtype=dtype, device="cuda")
        in_place, elsewhere = state.clone(), torch.full_like(state, float("nan"))
        try:
            ssd_state_update(in_place, **step, out=out, tactic=tactic)
        except KernelError:  # the vector tactics need rows of whole vectors, aligned
            assert tactic > 0 and headdim % 8
            continue
        assert error(out, expected[:, 0]) < TOLERANCE[dtype]
        assert error(in_place, final) < TOLERANCE[state_dtype]
        kept = state.clone()
        ssd_state_update(kept, **step, out_state=elsewhere, tactic=tactic)
        assert torch.equal(elsewhere, in_place) and torch.equal(kept, state)
