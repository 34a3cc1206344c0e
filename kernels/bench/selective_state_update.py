"""selective_state_update against mamba-ssm's Triton kernel: bfloat16, float32 state in place, d_state 16."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..selective_state_update import selective_state_update
from .harness import Context, Row, bound_by_copies, peer_source, sets_for, time_ms
from .selective_scan import make

SHAPES = [(1, 1536), (1, 5120), (8, 5120), (64, 1536), (64, 5120), (256, 5120), (1024, 1536)]


def load_peer(ctx: Context) -> Any:
    """The one file of the peer, without the package around it (which imports its compiled extensions)."""
    import sys
    import types

    folder = peer_source(ctx.sources, "mamba_ssm") / "mamba_ssm" / "ops" / "triton"
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("softplus", "selective_state_update"):
        spec = importlib.util.spec_from_file_location(f"mamba_ssm.ops.triton.{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module.selective_state_update


def bench(ctx: Context) -> Iterator[Row]:
    peer = load_peer(ctx)
    for batch, dim in SHAPES:
        size = batch * dim
        touched = 72 * size  # the state is read and written in one place
        sets = [make(batch, dim, 1, seed) for seed in range(sets_for(touched))]
        states = [torch.randn(batch, dim, 16, device="cuda") for _ in sets]
        ours = [partial(selective_state_update, **s, state=h, out=torch.empty_like(s["u"]), final_state=h) for s, h in zip(sets, states, strict=True)]  # noqa: E501  # fmt: skip
        theirs = [partial(peer, h, s["u"][:, 0], s["delta"][:, 0], s["A"], s["B"][:, 0, 0], s["C"][:, 0, 0], s["D"], s["z"][:, 0], s["delta_bias"], True) for s, h in zip(sets, states, strict=True)]  # noqa: E501  # fmt: skip
        row = Row(
            "selective_state_update", f"{batch}, {dim}", time_ms(ours), time_ms(theirs), size, "G (b,d)/s", 136 * size
        )
        bound_by_copies(row, ctx)
        a, b = states[0].clone(), states[0].clone()
        s = sets[0]
        y, _ = selective_state_update(**s, state=a, final_state=a)
        z = peer(b, *theirs[0].args[1:])
        row.note = f"ours against the peer's output {float((y[:, 0] - z).double().norm() / z.double().norm()):.1e}"
        yield row
