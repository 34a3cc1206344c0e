"""The scans at shapes nobody chose, against float64: what the selectors take, and two other tactics each."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from kernels.ssd_scan import ssd_scan, ssd_scan_tactics  # noqa: E402

from . import test_selective_scan as selective  # noqa: E402
from . import test_ssd_scan as ssd  # noqa: E402


def length(rng: random.Random, most: int) -> int:
    """1 to ``most``, as many short ones as long ones."""
    return round(math.exp(rng.uniform(0.0, math.log(most))))


def ssd_reference(
    x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any, dt_softplus: bool,
    dt_limit: tuple[float, float], initial_state: Any, seq_lens: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """float64, in chunks of 64 tokens; padding has no step, so that the state stays as it is."""
    batch, seqlen, nheads, _ = x.shape
    inside = torch.arange(seqlen, device=x.device)[None] < seq_lens[:, None]
    x, dt, B, C = (t.double().where(inside.view(batch, seqlen, *[1] * (t.dim() - 2)), 0.0) for t in (x, dt, B, C))
    B, C = (t.repeat_interleave(nheads // t.shape[2], 2) for t in (B, C))
    dt = dt + dt_bias.double()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit) * inside[..., None]
    state, y = initial_state.double(), torch.empty_like(x)
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
    y = y if z is None else y * F.silu(z.double())
    return y * inside[..., None, None], state


@pytest.mark.parametrize("seed", range(120))
def test_ssd_scan(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    headdim = rng.choice([64, 64, 64, 128, 128, 80, 80, 32, 96, 112, 72, 40, 8, 16, 7, 160])
    d_state = rng.choice([128, 128, 128, 64, 64, 256, 16, 96, 32, 40, 200, 8, 5])
    ngroups, batch = rng.choice([1, 1, 1, 2, 4, 8]), rng.choice([1, 1, 2, 3, 6, 17])
    nheads = ngroups * length(rng, 96 // ngroups)
    seqlen = length(rng, 2500)
    seqlen = max(1, min(seqlen, 40_000_000 // (batch * nheads * headdim), 60_000_000 // (batch * nheads * d_state)))
    shape = (batch, seqlen, nheads, headdim, ngroups, d_state)
    inputs = ssd.make(shape, dtype, seed, dt_scale=rng.choice([1.0, 1.0, 0.02, 20.0]))
    generator = torch.Generator("cuda").manual_seed(seed)
    if rng.random() < 0.4:
        inputs["z"] = torch.randn(inputs["x"].shape, generator=generator, device="cuda").to(dtype)
    if rng.random() < 0.3:
        inputs["D"] = torch.randn(nheads, headdim, generator=generator, device="cuda")
    if rng.random() < 0.3:
        inputs["dt_limit"] = (0.002, 0.1)
    lens = torch.full((batch,), seqlen, dtype=torch.int32, device="cuda")
    if rng.random() < 0.4:
        lens = torch.randint(0, seqlen + 1, (batch,), generator=generator, device="cuda", dtype=torch.int32)
    options = {"z": None, "dt_limit": (0.0, math.inf), **inputs}
    expected, final = ssd_reference(**options, seq_lens=lens)
    for row, end in enumerate(lens.tolist()):
        for name in ("x", "dt", "B", "C"):
            inputs[name][row, end:] = float("nan")
    found = ssd_scan_tactics(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))
    for tactic in (-1, *rng.sample(found, min(2, len(found)))):
        poisoned = torch.full(inputs["x"].shape, float("nan"), dtype=dtype, device="cuda")
        y, h = ssd_scan(**inputs, seq_lens=lens, return_final_state=True, out=poisoned, tactic=tactic)
        where = (shape, dtype, tactic)
        assert ssd.error(y, expected) < ssd.tolerance(dtype, tactic), where
        assert ssd.error(h, final) < ssd.tolerance(dtype, tactic), where


@pytest.mark.parametrize("seed", range(80))
def test_selective_scan(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    groups, batch = rng.choice([1, 1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 3, 8])
    dim = groups * rng.choice([length(rng, 2500 // groups), 8 * length(rng, 700 // groups)])
    d_state = rng.choice([16, 16, 16, 16, 8, 32, 64, 5, 128])
    seqlen = length(rng, 1500)
    seqlen = max(1, min(seqlen, 20_000_000 // (batch * dim)))
    shape = (batch, seqlen, dim, d_state, groups)
    inputs = selective.make(shape, dtype, seed, scale=rng.choice([16.0, 16.0, 1.0, 200.0]))
    reverse = rng.random() < 0.25
    if reverse or rng.random() < 0.3:
        inputs["z"] = None
    lens = None
    if rng.random() < 0.4:
        lens = torch.randint(1, seqlen + 1, (batch,), device="cuda", dtype=torch.int32)
    expected, final = selective.reference(**inputs, seq_lens=lens, reverse=reverse)
    if lens is not None:
        padding = torch.arange(seqlen, device="cuda")[None, :] >= lens[:, None]
        for name in ("u", "delta", "B", "C"):
            inputs[name][padding] = float("nan")
    found = selective.some_tactics(inputs)
    for tactic in (-1, *rng.sample(found, min(2, len(found)))):
        y, h = selective.run(inputs, seq_lens=lens, reverse=reverse, tactic=tactic)
        where = (shape, dtype, hex(tactic))
        assert selective.error(y, expected) < selective.TOLERANCE[dtype], where
        assert selective.error(h, final) < 1e-5, where
