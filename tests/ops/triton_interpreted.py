"""The Triton ops, interpreted, against the closed form; run by ``test_triton.py`` with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.oracle import assert_closed_form
from tests.ops.samples import KINDS, Kind, examples, ragged_samples, samples

PREFILL = {"conv": "causal_conv1d", "scan": "selective_scan", "ssd": "ssd_scan"}
STEP = {"conv": "causal_conv1d", "scan": "selective_state_update", "ssd": "ssd_state_update"}
LIMIT = {torch.float32: 2e-5, torch.float16: 2.0**-9}
by_kind = pytest.mark.parametrize("kind", KINDS)


def call(name: str, arguments: tuple[Any, ...], **more: Any) -> Any:
    return getattr(importlib.import_module(f"kernels.triton.{name}"), name)(*arguments, **more)


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp16"])
@by_kind
@given(data=st.data())
@examples(8)
def test_closed_form(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    extreme = None if dtype == torch.float32 else False
    sample = data.draw(samples(kind, extreme=extreme, max_length=80)).to(dtype)
    pieces = {} if kind == "conv" else {"pieces": data.draw(st.integers(1, 3))}
    found = call(PREFILL[kind], sample.arguments(), **pieces)
    assert found[0].dtype == dtype
    assert_closed_form((found[0].float(), found[1].float()), sample, LIMIT[dtype], LIMIT[dtype])
    token = sample.piece(0, 1).with_options(**({} if kind == "conv" else {"reverse": False}))
    found = call(STEP[kind], token.step_arguments())
    assert_closed_form((found[0].float(), found[1].float()), token, LIMIT[dtype], LIMIT[dtype])


@by_kind
@given(data=st.data())
@examples(8)
def test_padding_touches_nothing(kind: Kind, data: st.DataObject) -> None:
    sample, lens = data.draw(ragged_samples(kind))
    pieces = {} if kind == "conv" else {"pieces": data.draw(st.integers(1, 3))}
    y, present = call(PREFILL[kind], sample.arguments(lens), **pieces)
    for row, length in enumerate(lens.tolist()):
        assert not y[row, length:].any()
        if length == 0:
            assert torch.equal(present[row], sample.state[row])
        else:
            found = y[row : row + 1, :length], present[row : row + 1]
            assert_closed_form(found, sample.row(row, length), LIMIT[torch.float32], LIMIT[torch.float32])
