"""causal_conv1d against causal-conv1d's forward, both on channel-last bfloat16 with four taps, bias and SiLU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..causal_conv1d import causal_conv1d
from .harness import Context, Row, bound_by_copies, relative_error, sets_for, time_ms

SHAPES = [(1, 1536, 2048), (1, 5120, 2048), (8, 5120, 2048), (1, 1536, 65536), (1, 5120, 1), (64, 5120, 1)]


def reference(x: Any, weight: Any, bias: Any) -> Any:
    padded = F.pad(x.double(), (0, 0, 3, 0))
    y = sum(padded[:, j : j + x.shape[1]] * weight[:, j].double() for j in range(4))
    return F.silu(y + bias.double())


def bench(ctx: Context) -> Iterator[Row]:
    peer = ctx.peer("causal_conv1d")
    for batch, channels, seqlen in SHAPES:
        size = batch * channels * seqlen
        sets = sets_for(4 * size)
        xs = [torch.randn(batch, seqlen, channels, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        ys = [torch.empty_like(x) for x in xs]
        weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16)
        moved = (4 if seqlen > 1 else 16) * size  # a step reads and writes three older inputs a channel as well
        row = Row("causal_conv1d", f"{batch}, {channels}, {seqlen}", 0.0, None, size, "G elements/s", moved)
        bound_by_copies(row, ctx)
        if seqlen > 1:
            state = torch.empty(batch, channels, 3, device="cuda", dtype=torch.bfloat16)
            row.ours_ms = time_ms([partial(causal_conv1d, x, weight, bias, out=y, final_state=state) for x, y in zip(xs, ys, strict=True)])  # noqa: E501  # fmt: skip
            arguments = [(x.transpose(1, 2), weight, bias, None, None, y.transpose(1, 2), None, True) for x, y in zip(xs, ys, strict=True)]  # noqa: E501  # fmt: skip
            row.peer_ms = time_ms([partial(peer.causal_conv1d_fwd, *a) for a in arguments])
            exact = reference(xs[0][:, :4096], weight, bias)
            row.peer_error = relative_error(ys[0][:, :4096], exact)
            causal_conv1d(xs[0], weight, bias, out=ys[0])
            row.ours_error = relative_error(ys[0][:, :4096], exact)
        else:
            states = [torch.randn(batch, channels, 3, device="cuda", dtype=torch.bfloat16) for _ in xs]
            row.note = "step, state in place"
            row.ours_ms = time_ms([partial(causal_conv1d, x, weight, bias, s, out=y, final_state=s) for x, y, s in zip(xs, ys, states, strict=True)])  # noqa: E501  # fmt: skip
            row.peer_ms = time_ms([partial(peer.causal_conv1d_update, x.transpose(1, 2), s, weight, bias, y.transpose(1, 2), True, None, None) for x, y, s in zip(xs, ys, states, strict=True)])  # noqa: E501  # fmt: skip
        yield row
