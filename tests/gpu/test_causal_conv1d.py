"""causal_conv1d on the GPU against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.causal_conv1d import causal_conv1d  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
PIECES = (10006, 10008)  # for four taps of 16-bit vectors


def reference(x: Any, weight: Any, bias: Any, state: Any, lens: Any, activation: bool) -> tuple[Any, Any]:
    width, (batch, seqlen, channels) = weight.shape[1], x.shape
    padding = torch.arange(seqlen, device=x.device)[None, :] >= lens[:, None]
    x = x.double().masked_fill(padding[:, :, None], 0)
    state = torch.zeros(batch, channels, width - 1, device=x.device) if state is None else state
    padded = torch.cat([state.double(), x.transpose(1, 2)], 2)
    y = (padded.unfold(2, width, 1) * weight.double()[:, None]).sum(-1) + (
        0 if bias is None else bias.double()[:, None]
    )
    y = (torch.nn.functional.silu(y) if activation else y).transpose(1, 2).masked_fill(padding[:, :, None], 0)
    index = lens.long()[:, None] + torch.arange(width - 1, device=x.device)
    return y, padded.gather(2, index[:, None].expand(-1, channels, -1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *(
            (1, 1, 64, 4),
            (2, 2, 72, 4),
            (2, 37, 96, 4),
            (1, 200, 33, 4),
            (3, 65, 40, 2),
            (1, 100, 128, 8),
            (2, 50, 24, 3),
        ),
        *((3, 1, 33, 3), (5, 1, 264, 8), (2, 7, 136, 8), (1, 3000, 256, 4)),
    ],
    ids=str,
)
def test_matches_float64(shape: tuple[int, ...], dtype: Any) -> None:
    batch, seqlen, channels, width = shape
    torch.manual_seed(seqlen)
    for ragged in (False, True):
        for wide_weight in (False, True):
            x = torch.randn(batch, seqlen, channels, device="cuda").to(dtype)
            weight = torch.randn(channels, width, device="cuda").to(torch.float32 if wide_weight else dtype)
            bias = None if ragged and wide_weight else torch.randn(channels, device="cuda").to(weight.dtype)
            state = torch.randn(batch, channels, width - 1, device="cuda").to(dtype) if ragged else None
            lens = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
            if ragged:
                lens = torch.randint(1, seqlen + 1, (batch,), device="cuda", dtype=torch.int32)
            expected, present = reference(x, weight, bias, state, lens, not wide_weight)
            if ragged:
                x[torch.arange(seqlen, device="cuda")[None, :] >= lens[:, None]] = float("nan")
            pieces = PIECES if width == 4 and channels % 8 == 0 and seqlen > 1 and dtype != torch.float32 else ()
            for tactic in (-1, 1, 4, 64, *pieces):
                y = torch.full_like(x, float("nan"))
                options = {"seq_lens": lens if ragged else None, "activation": not wide_weight, "tactic": tactic}
                _, out = causal_conv1d(x, weight, bias, state, **options, out=y)
                assert float((y.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
                assert torch.equal(out.double(), present)
                if state is not None:
                    in_place = state.clone()
                    causal_conv1d(x, weight, bias, in_place, **options, final_state=in_place)
                    assert torch.equal(in_place, out)


def test_rows_of_no_tokens_keep_the_state() -> None:
    for seqlen in (1, 5, 40):
        x, state = torch.full((3, seqlen, 48), float("nan"), device="cuda"), torch.randn(3, 48, 3, device="cuda")
        lens = torch.zeros(3, device="cuda", dtype=torch.int32)
        weight = torch.randn(48, 4, device="cuda")
        y, out = causal_conv1d(x, weight, None, state, lens)
        assert not y.any() and torch.equal(out, state)


def test_bitwise_reproducible() -> None:
    x, weight = torch.randn(2, 700, 256, device="cuda").bfloat16(), torch.randn(256, 4, device="cuda").bfloat16()
    for tactic in (-1, 12, *PIECES):
        first = causal_conv1d(x, weight, tactic=tactic)
        for _ in range(3):
            again = causal_conv1d(x, weight, tactic=tactic)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
