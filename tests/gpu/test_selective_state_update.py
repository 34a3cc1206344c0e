"""selective_state_update on the GPU against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.selective_state_update import selective_state_update  # noqa: E402

from .test_selective_scan import TOLERANCE, error, make, reference  # noqa: E402

SHAPES = [
    (1, 64, 16, 1),
    (3, 48, 16, 2),
    (5, 33, 16, 1),
    (2, 24, 64, 1),
    (2, 24, 20, 1),
    (67, 128, 16, 1),
    (2, 16, 8, 1),
]


@pytest.mark.parametrize("state_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: Any, state_dtype: Any) -> None:
    batch, dim, d_state, groups = shape
    for gated in (True, False):
        inputs = make((batch, 1, dim, d_state, groups), dtype, seed=dim)
        inputs["state"] = inputs["state"].to(state_dtype)
        if not gated:
            inputs["z"] = None
        expected, final = reference(**inputs, seq_lens=None, reverse=False)
        state, z = inputs.pop("state"), inputs.pop("z")
        for tactic in (-1, 0):
            y, h = selective_state_update(**inputs, state=state, z=z, tactic=tactic)
            assert error(y, expected) < TOLERANCE[dtype]
            assert error(h, final) < TOLERANCE[state_dtype]
            in_place = state.clone()
            selective_state_update(**inputs, state=in_place, z=z, final_state=in_place, tactic=tactic)
            assert torch.equal(in_place, h)
