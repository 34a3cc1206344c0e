"""The torch ops: against a closed form, and against themselves under splits, padding, reversal and single steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_export.ops.rms_norm import add_rms_norm
from tests.ops.oracle import assert_closed_form, oracle, relative
from tests.ops.samples import (
    KINDS,
    PREFILL_OPS,
    STEP_OPS,
    Kind,
    Sample,
    examples,
    poisoned,
    ragged_samples,
    run,
    run_reference,
    run_step,
    samples,
)

# Units of the sum of magnitudes of all terms. An exponent ΔA counts up to 88 before it underflows, and its rounding
# error is relative, so float32 loses up to 88 * 6e-8 there.
F32 = 1e-5
F64 = 1e-11
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
by_kind = pytest.mark.parametrize("kind", KINDS)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two ways to the same float32 numbers: equal to a few roundings."""
    for name, a, b in zip(("y", "present"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@by_kind
@given(data=st.data())
@examples(40)
def test_ops_compute_the_closed_form(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind))
    for result, limit in ((run(sample), F32), (run_reference(sample.to(torch.float64)), F64)):
        assert_closed_form(result, sample, limit, limit)


@pytest.mark.parametrize("dtype", EPS, ids=["fp16", "bf16"])
@by_kind
@given(data=st.data())
@examples(15)
def test_half_precision_rounds_activations_only(kind: Kind, dtype: torch.dtype, data: st.DataObject) -> None:
    """The scan and its state stay float32 inside: y is rounded once, the state of a scan not at all."""
    sample = data.draw(samples(kind, extreme=False)).to(dtype)
    y, present, y_size, present_size = oracle(sample)
    found_y, found_present = run(sample)
    assert found_y.dtype == dtype
    assert relative(found_y.double(), y, y_size) < EPS[dtype]
    if kind == "conv":
        assert torch.equal(found_present.double(), torch.from_numpy(present))
    else:
        assert found_present.dtype == torch.float32
        assert relative(found_present, present, present_size) < F32


@by_kind
@given(data=st.data())
@examples(30)
def test_any_split_of_a_sequence_gives_the_same(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, reverse=False, min_length=2, extreme=False))
    cuts = sorted(data.draw(st.sets(st.integers(1, sample.length - 1), max_size=3)))
    state, pieces = sample.state, []
    for start, stop in zip([0, *cuts], [*cuts, sample.length], strict=True):
        y, state = run(sample.piece(start, stop).with_state(state))
        pieces.append(y)
    assert_same((torch.cat(pieces, dim=1), state), run(sample))


@by_kind
@given(data=st.data())
@examples(30)
def test_steps_are_a_scan(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, reverse=False, extreme=False))
    state, tokens = sample.state, []
    for t in range(sample.length):
        token = sample.piece(t, t + 1).with_state(state)
        y, state = run_step(token)
        assert_same((y, state), run(token))
        tokens.append(y)
    assert_same((torch.cat(tokens, dim=1), state), run(sample))


@by_kind
@given(data=st.data())
@examples(40)
def test_padding_touches_nothing(kind: Kind, data: st.DataObject) -> None:
    sample, lens = data.draw(ragged_samples(kind))
    y, present = run(sample, lens)
    for row, length in enumerate(lens.tolist()):
        assert torch.equal(y[row, length:], torch.zeros_like(y[row, length:]))
        if length == 0:
            assert torch.equal(present[row], sample.state[row])
        else:
            assert_same((y[row : row + 1, :length], present[row : row + 1]), run(sample.row(row, length)))


@by_kind
@given(data=st.data())
@examples(15)
def test_full_rows_need_no_lengths(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind))
    full = torch.full((sample.batch,), sample.length, dtype=torch.int32)
    assert_same(run(sample, full), run(sample))


@pytest.mark.parametrize("kind", ["scan", "ssd"])
@given(data=st.data())
@examples(25)
def test_reverse_is_forward_over_flipped_time(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, reverse=True))
    y, present = run(sample.map_time(lambda x: x.flip(1)).with_options(reverse=False))
    assert_same(run(sample), (y.flip(1), present))


@pytest.mark.parametrize("kind", ["scan", "ssd"])
@given(data=st.data())
@examples(15)
def test_rows_do_not_see_each_other(kind: Kind, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, extreme=False))
    y, present = run(sample)
    for row in range(sample.batch):
        assert_same((y[row : row + 1], present[row : row + 1]), run(sample.row(row, sample.length)))


@by_kind
@given(data=st.data())
@examples(5)
def test_fakes_and_schemas_agree_with_the_ops(kind: Kind, data: st.DataObject) -> None:
    """torch.export trusts the fake implementations: shapes, dtypes and strides must be those of the real ones."""
    sample, lens = data.draw(ragged_samples(kind))
    sample = poisoned(sample, lens, 0.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(PREFILL_OPS[kind], sample.arguments(lens), test_utils=checks)
    token = sample.piece(0, 1)
    torch.library.opcheck(STEP_OPS[kind], token.step_arguments(), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(dtype: torch.dtype, with_residual: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x = (3 * torch.randn(2, 3, 7, generator=generator)).to(dtype)
    weight = torch.randn(7, generator=generator).to(dtype)
    residual = torch.randn(2, 3, 7, generator=generator) if with_residual else None
    y, total = add_rms_norm(x, weight, residual, 1e-3)
    exact = x.double() if residual is None else x.double() + residual.double()
    wanted = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert total.dtype == (dtype if residual is None else torch.float32)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), wanted, rtol=EPS.get(dtype, 1e-6), atol=1e-6)
    torch.library.opcheck(add_rms_norm, (x, weight, residual, 1e-3), test_utils=("test_schema", "test_faketensor"))


def test_nan_inside_a_row_is_not_hidden() -> None:
    """Masking is for padding only: a NaN that the model computes must reach the output."""
    sample = Sample(
        "scan",
        {
            name: torch.ones(1, 3, *shape)
            for name, shape in {"u": (2,), "delta": (2,), "B": (1, 3), "C": (1, 3)}.items()
        },
        {"A": -torch.ones(2, 3), "D": torch.ones(2), "delta_bias": torch.zeros(2)},
        torch.zeros(1, 2, 3),
        {"softplus": True, "reverse": False},
    )
    sample.time["u"][0, 1, 0] = float("nan")
    y, present = run(sample, torch.tensor([2], dtype=torch.int32))
    assert torch.isnan(y[0, 1, 0]) and torch.isnan(present[0, 0]).all()
    assert torch.isfinite(y[0, :, 1]).all() and torch.isfinite(present[0, 1]).all()
