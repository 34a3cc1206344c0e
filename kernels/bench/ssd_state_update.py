"""ssd_state_update against mamba-ssm's Triton kernel: bfloat16, float32 state in place, headdim 64, d_state 128."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..ssd_state_update import ssd_state_update
from .harness import Context, Row, bound_by_copies, relative_error, sets_for, time_ms
from .ssd_scan import load_peer, make

SHAPES = [(1, 24), (1, 80), (8, 80), (64, 24), (64, 80), (256, 80), (1024, 80)]


def theirs(peer: Any, state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    """The peer's call as its Mamba-2 layer makes it: scalars of a head expanded over headdim and d_state."""
    over = state.shape[2]
    return peer(
        state, x, dt[:, :, None].expand(-1, -1, over), A[:, None, None].expand(-1, over, state.shape[3]), B, C,
        D[:, None].expand(-1, over), None, dt_bias[:, None].expand(-1, over), True,
    )  # fmt: skip


def step_reference(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    dt = torch.nn.functional.softplus(dt.double() + dt_bias.double())
    keep = torch.exp(dt * A.double())[..., None, None]
    new = keep * state.double() + (dt[..., None] * x.double())[..., None] * B.double()[:, :, None]
    return (new * C.double()[:, :, None]).sum(-1) + D.double()[:, None] * x.double()


def bench(ctx: Context) -> Iterator[Row]:
    peer = load_peer(ctx, "selective_state_update").selective_state_update
    for batch, nheads in SHAPES:
        size = batch * nheads * 64 * 128
        sets = []
        for seed in range(sets_for(4 * size)):  # the state is read and written in one place
            inputs = make(batch, nheads, 1, torch.bfloat16, seed)
            inputs.pop("dt_softplus")
            sets.append(inputs)
        states = [torch.randn(batch, nheads, 64, 128, device="cuda") for _ in sets]
        ours = [partial(ssd_state_update, **s, state=h, final_state=h, out=torch.empty_like(s["x"]))
                for s, h in zip(sets, states, strict=True)]  # fmt: skip
        tokens = [{k: v[:, 0] if k in ("x", "dt", "B", "C") else v for k, v in s.items()} for s in sets]
        others = [partial(theirs, peer, h, **s) for s, h in zip(tokens, states, strict=True)]
        row = Row("ssd_state_update", f"{batch}, {nheads}", time_ms(ours), time_ms(others), size, "G state/s", 8 * size)
        bound_by_copies(row, ctx)
        if batch <= 64:
            state = torch.randn_like(states[0])
            expected = step_reference(state, **tokens[0])
            row.ours_error = relative_error(ssd_state_update(**sets[0], state=state)[0][:, 0], expected)
            row.peer_error = relative_error(theirs(peer, state.clone(), **tokens[0]), expected)
        yield row
