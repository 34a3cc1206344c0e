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
# nheads, headdim, d_state, groups; batch 1, 2,048 tokens
SIZES = [(128, 80, 128, 8), (40, 128, 128, 1), (160, 32, 128, 1), (80, 64, 256, 1), (80, 64, 64, 1), (80, 64, 16, 1)]
TENSOR_FLOPS = 790e12  # dense bfloat16, measured with a large matrix product


def load_peer(ctx: Context, name: str) -> Any:
    """A module of the peer's Triton folder; its package is replaced by an empty one, which builds no extension."""
    root = peer_source(ctx.sources, "mamba_ssm")
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        module = sys.modules.setdefault(package, type(sys)(package))
        module.__path__ = [str(root / package.replace(".", "/"))]
    return importlib.import_module(f"mamba_ssm.ops.triton.{name}")


def make(
    batch: int, nheads: int, seqlen: int, dtype: torch.dtype, seed: int, headdim: int = 64, d_state: int = 128,
    ngroups: int = 1,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    step = torch.exp(torch.rand(nheads, generator=generator, device="cuda") * 4.6 - 6.9)
    return {
        "x": normal(batch, seqlen, nheads, headdim).to(dtype),
        "dt": normal(batch, seqlen, nheads).to(dtype),
        "A": -(1 + 15 * torch.rand(nheads, generator=generator, device="cuda")),
        "B": normal(batch, seqlen, ngroups, d_state).to(dtype),
        "C": normal(batch, seqlen, ngroups, d_state).to(dtype),
        "D": normal(nheads),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "dt_softplus": True,
    }


def reference(
    x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_softplus: bool, z: Any = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")), initial_state: Any = None, seq_lens: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """y and the final state in float64, in chunks of 64 tokens; padding has no step, so that the state stays."""
    batch, seqlen, nheads, headdim = x.shape
    inside = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    if seq_lens is not None:
        inside = torch.arange(seqlen, device=x.device)[None] < seq_lens[:, None]
    x, dt, B, C = (t.double().where(inside.view(batch, seqlen, *[1] * (t.dim() - 2)), 0.0) for t in (x, dt, B, C))
    B, C = (t.repeat_interleave(nheads // t.shape[2], 2) for t in (B, C))
    dt = dt + dt_bias.double()
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit) * inside[..., None]
    state = torch.zeros(batch, nheads, headdim, B.shape[-1], dtype=torch.float64, device=x.device)
    state, y = state if initial_state is None else initial_state.double(), torch.empty_like(x)
    for begin in range(0, seqlen, 64):
        t = slice(begin, begin + 64)
        total = (dt[:, t] * A.double()).cumsum(1)
        span = total[:, :, None] - total[:, None]
        causal = torch.ones(span.shape[1:3], dtype=torch.bool, device=x.device).tril()[None, :, :, None]
        scores = torch.einsum("bthn,bshn->btsh", C[:, t], B[:, t]) * span.where(causal, -torch.inf).exp()
        y[:, t] = torch.einsum("btsh,bshp->bthp", scores * dt[:, None, t], x[:, t])
        y[:, t] += total.exp()[..., None] * torch.einsum("bthn,bhpn->bthp", C[:, t], state)
        weights = (total[:, -1:] - total).exp() * dt[:, t]
        state = total[:, -1].exp()[..., None, None] * state
        state = state + torch.einsum("bsh,bshp,bshn->bhpn", weights, x[:, t], B[:, t])
    y = y + x * (D.double() if D.dim() == 2 else D.double()[:, None])
    y = y if z is None else y * torch.nn.functional.silu(z.double())
    return y * inside[..., None, None], state


def bench(ctx: Context) -> Iterator[Row]:
    peer = load_peer(ctx, "ssd_combined")._mamba_chunk_scan_combined_fwd

    def theirs(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_softplus: bool) -> Any:
        return peer(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)[0]

    plain: tuple[int, int, int] = (64, 128, 1)
    cases = [(shape, torch.bfloat16, plain) for shape in SHAPES]
    cases += [((1, 24, 2048), dtype, plain) for dtype in (torch.float16, torch.float32)]
    cases += [((1, size[0], 2048), torch.bfloat16, size[1:]) for size in SIZES]
    for (batch, nheads, seqlen), dtype, (headdim, d_state, ngroups) in cases:
        size = {"headdim": headdim, "d_state": d_state, "ngroups": ngroups}
        tokens, width = batch * seqlen, 2 if dtype != torch.float32 else 4
        traffic = width * tokens * (nheads * (2 * headdim + 1) + 2 * ngroups * d_state)
        sets = [make(batch, nheads, seqlen, dtype, seed, **size) for seed in range(sets_for(traffic, most=12))]
        name = f"{batch}, {nheads}, {seqlen} {str(dtype)[6:]}"
        if (headdim, d_state, ngroups) != plain:
            name += f", headdim {headdim}, d_state {d_state}, {ngroups} groups".replace("1 groups", "1 group")
        row = Row("ssd_scan", name,
                  time_ms([partial(ssd_scan, **s, out=torch.empty_like(s["x"])) for s in sets]),
                  time_ms([partial(theirs, **s) for s in sets]),
                  tokens * nheads, "G (t,h)/s", traffic)  # fmt: skip
        # The products any chunked form needs: C h, x^T B and a causal chunk of 64 at least.
        flops = tokens * nheads * (2 * 2 * headdim * d_state + 2 * headdim * 32)
        row.floor_ms = max(traffic / ctx.copy_bandwidth, flops / TENSOR_FLOPS) * 1e3
        if batch * seqlen <= 2048:
            expected, _ = reference(**sets[0])
            ours: Any = ssd_scan(**sets[0])
            row.ours_error = relative_error(ours, expected)
            row.peer_error = relative_error(theirs(**sets[0]), expected)
        yield row
