"""selective_scan against mamba-ssm's forward: bfloat16, with z, D, delta bias and softplus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..selective_scan import selective_scan
from .harness import Context, Row, relative_error, sets_for, time_ms

SHAPES = [  # d_state 16
    *((1, 768, 2048), (1, 1024, 1024), (1, 1536, 256)),
    *((1, 1536, 128), (1, 1536, 512), (1, 1536, 2048), (1, 1536, 2056), (1, 5120, 1000), (1, 5120, 2048)),
    *((1, 5120, 2056), (1, 5120, 3000), (1, 3072, 2048), (1, 4096, 2048), (1, 8192, 2048), (4, 1536, 2048)),
    *((8, 1536, 512), (3, 5120, 512), (2, 5120, 2048), (8, 5120, 2048), (12, 5120, 2048), (16, 5120, 4096)),
    *((1, 1536, 262144), (1, 1536, 1048576)),
]
SIZES = [
    *(((1, 1536, 2048), n) for n in (8, 32, 64, 128, 256)),
    ((1, 5120, 2048), 8),
    ((1, 5120, 2048), 64),
]  # and d_state
FLOOR = 209e9 * 20  # exponential-like operations per second: one a state and four more for each (channel, token)


def make(batch: int, dim: int, seqlen: int, seed: int, d_state: int = 16) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*size: int) -> Any:
        return torch.randn(*size, device="cuda", generator=generator, dtype=torch.bfloat16)

    return {
        "u": randn(batch, seqlen, dim),
        "delta": 0.5 * randn(batch, seqlen, dim) - 3,
        "A": -torch.rand(dim, d_state, device="cuda", generator=generator) * 16,
        "B": randn(batch, seqlen, 1, d_state),
        "C": randn(batch, seqlen, 1, d_state),
        "D": randn(dim).float(),
        "delta_bias": 0.3 * randn(dim).float(),
        "z": randn(batch, seqlen, dim),
    }


def peer_arguments(s: dict[str, Any]) -> tuple[Any, ...]:
    """The same inputs in the peer's native layout, channels first."""
    u, delta, z = (s[k].transpose(1, 2).contiguous() for k in ("u", "delta", "z"))
    B, C = (s[k].permute(0, 2, 3, 1).contiguous() for k in ("B", "C"))
    return u, delta, s["A"], B, C, s["D"], z, s["delta_bias"], True


def reference(s: dict[str, Any], tokens: int) -> Any:
    """y of the first tokens in float64."""
    u, delta, B, C, z = (s[k][:, :tokens].double() for k in ("u", "delta", "B", "C", "z"))
    dt, A, y = F.softplus(delta + s["delta_bias"].double()), s["A"].double(), torch.empty_like(u)
    h = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64, device="cuda")
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1)
    return (y + s["D"].double() * u) * F.silu(z)


def bench(ctx: Context) -> Iterator[Row]:
    peer = ctx.peer("selective_scan")
    for (batch, dim, seqlen), d_state in [*((shape, 16) for shape in SHAPES), *SIZES]:
        work = batch * dim * seqlen
        if ctx.quick and work > 2e7:
            continue
        sets = [make(batch, dim, seqlen, seed, d_state) for seed in range(1 if work > 5e7 else sets_for(8 * work))]
        outs: list[dict[str, Any]] = [
            {"out": torch.empty_like(s["u"]), "final_state": torch.empty(batch, dim, d_state, device="cuda")}
            for s in sets
        ]
        ours = time_ms([partial(selective_scan, **s, **o) for s, o in zip(sets, outs, strict=True)])
        y = selective_scan(**sets[0])[0][:, :512]
        arguments = [peer_arguments(s) for s in sets]
        theirs = time_ms([partial(peer.fwd, *a) for a in arguments])
        out_z = peer.fwd(*arguments[0])[-1].transpose(1, 2)[:, :512]
        name = f"{batch}, {dim}, {seqlen}" + (f", d_state {d_state}" if d_state != 16 else "")
        row = Row("selective_scan", name, ours, theirs, work, "G (d,t)/s", 8 * work)
        row.floor_ms = work * (d_state + 4) / FLOOR * 1e3
        if work < 2e7:
            exact = reference(sets[0], 512)
            row.ours_error, row.peer_error = relative_error(y, exact), relative_error(out_z, exact)
        yield row
        del sets, outs, arguments, y, out_z
        torch.cuda.empty_cache()
