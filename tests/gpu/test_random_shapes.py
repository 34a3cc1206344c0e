"""The scans at shapes nobody chose, against float64: what the selectors take, and two other tactics each."""

from __future__ import annotations

import math
import random

import pytest

torch = pytest.importorskip("torch")

from kernels.bench.ssd_scan import reference  # noqa: E402
from kernels.ssd_scan import ssd_scan, ssd_scan_tactics  # noqa: E402

from . import test_selective_scan as selective  # noqa: E402
from . import test_ssd_scan as ssd  # noqa: E402


def length(rng: random.Random, most: int) -> int:
    """1 to ``most``, as many short ones as long ones."""
    return round(math.exp(rng.uniform(0.0, math.log(most))))


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
    expected, final = reference(**inputs, seq_lens=lens)
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
    d_state = rng.choice([16, 16, 16, 16, 8, 32, 64, 5, 128, 24, 256])
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
