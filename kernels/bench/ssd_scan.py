"""ssd_scan against mamba-ssm's Triton mamba_chunk_scan_combined, chunk 256, each replayed as a CUDA graph."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..ssd_scan import ssd_scan
from .harness import Context, Row, peer_source, relative_error, sets_for, time_ms

# batch, nheads, seqlen; headdim 64, d_state 128, one group
SHAPES = [(1, 24, 2048), (1, 80, 512), (1, 80, 2048), (1, 80, 8192), (1, 80, 65536), (8, 80, 2048)]
TENSOR_FLOPS = 790e12  # dense bfloat16, measured with a large matrix product


def load_peer(ctx: Context, name: str) -> Any:
    """A module of the peer's Triton folder; its package is replaced by an empty one, which builds no extension."""
    root = peer_source(ctx.sources, "mamba_ssm")
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        module = sys.modules.setdefault(package, type(sys)(package))
        module.__path__ = [str(root / package.replace(".", "/"))]
    return importlib.import_module(f"mamba_ssm.ops.triton.{name}")


def make(batch: int, nheads: int, seqlen: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    step = torch.exp(torch.rand(nheads, generator=generator, device="cuda") * 4.6 - 6.9)
    return {
        "x": normal(batch, seqlen, nheads, 64).to(dtype),
        "dt": normal(batch, seqlen, nheads).to(dtype),
        "A": -(1 + 15 * torch.rand(nheads, generator=generator, device="cuda")),
        "B": normal(batch, seqlen, 1, 128).to(dtype),
        "C": normal(batch, seqlen, 1, 128).to(dtype),
        "D": normal(nheads),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "dt_softplus": True,
    }


def reference(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_softplus: bool) -> Any:
    """float64, in blocks of 128 tokens."""
    x, B, C, D = x.double(), B.double()[:, :, 0], C.double()[:, :, 0], D.double()
    dt = torch.nn.functional.softplus(dt.double() + dt_bias.double())
    batch, seqlen, nheads, headdim = x.shape
    state = torch.zeros(batch, nheads, headdim, B.shape[-1], dtype=torch.float64, device=x.device)
    out = torch.empty_like(x)
    for begin in range(0, seqlen, 128):
        piece = slice(begin, begin + 128)
        u, b, c, d = x[:, piece], B[:, piece], C[:, piece], dt[:, piece]
        total = (d * A.double()).cumsum(1)
        causal = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=x.device).tril()[None, :, :, None]
        decay = torch.where(causal, total[:, :, None] - total[:, None], -torch.inf).exp() * d[:, None]
        scores = torch.einsum("btn,bsn->bts", c, b)[..., None] * decay
        out[:, piece] = torch.einsum("btsh,bshp->bthp", scores, u)
        out[:, piece] += total.exp()[..., None] * torch.einsum("btn,bhpn->bthp", c, state) + D[:, None] * u
        weights = (total[:, -1:] - total).exp() * d
        state = total[:, -1].exp()[..., None, None] * state + torch.einsum("bsh,bshp,bsn->bhpn", weights, u, b)
    return out


def bench(ctx: Context) -> Iterator[Row]:
    peer = load_peer(ctx, "ssd_combined")._mamba_chunk_scan_combined_fwd

    def theirs(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_softplus: bool) -> Any:
        return peer(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)[0]

    cases = [(shape, torch.bfloat16) for shape in SHAPES] + [
        ((1, 24, 2048), torch.float16),
        ((1, 24, 2048), torch.float32),
    ]
    for (batch, nheads, seqlen), dtype in cases:
        tokens, width = batch * seqlen, 2 if dtype != torch.float32 else 4
        traffic = width * tokens * (nheads * (2 * 64 + 1) + 2 * 128)
        sets = [make(batch, nheads, seqlen, dtype, seed) for seed in range(sets_for(traffic, most=12))]
        row = Row("ssd_scan", f"{batch}, {nheads}, {seqlen} {str(dtype)[6:]}",
                  time_ms([partial(ssd_scan, **s, out=torch.empty_like(s["x"])) for s in sets]),
                  time_ms([partial(theirs, **s) for s in sets]),
                  tokens * nheads, "G (t,h)/s", traffic)  # fmt: skip
        # The products any chunked form needs: C h, x^T B and a causal chunk of 64 at least.
        flops = tokens * nheads * (2 * 2 * 64 * 128 + 2 * 64 * 32)
        row.floor_ms = max(traffic / ctx.copy_bandwidth, flops / TENSOR_FLOPS) * 1e3
        if batch * seqlen <= 2048:
            expected = reference(**sets[0])
            ours: Any = ssd_scan(**sets[0])
            row.ours_error = relative_error(ours, expected)
            row.peer_error = relative_error(theirs(**sets[0]), expected)
        yield row
