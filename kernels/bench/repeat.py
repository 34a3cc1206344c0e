"""Whether the scans give the same bits every time: ``python -m kernels.bench.repeat``, on a GPU, a minute or two.

Apart: before every call y, the final state and the workspace are filled with NaN. Together: calls in a row without a
wait or a fill between them, by turns on two inputs in one workspace, where what the call before left would show.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from .. import selective_scan, ssd_scan
from ..library import KernelError, load
from . import selective_scan as selective_scan_bench
from . import ssd_scan as ssd_scan_bench

Shape = tuple[int, int, int]
SHAPES: dict[str, tuple[Shape, ...]] = {
    "ssd_scan": ((1, 80, 8192), (8, 80, 2048), (1, 80, 2048), (1, 24, 2048)),
    "selective_scan": ((8, 5120, 2048), (1, 5120, 2048), (1, 1536, 65536), (1, 1536, 512), (8, 1536, 512)),
}
IN_A_ROW = 8


def make(op: str, shape: Shape, seed: int) -> dict[str, Any]:
    if op == "ssd_scan":
        return ssd_scan_bench.make(*shape, torch.bfloat16, seed)
    return selective_scan_bench.make(*shape, seed)


class Call:
    """One call of a scan on its own outputs, in a workspace that may be shared."""

    def __init__(self, op: str, inputs: dict[str, Any], workspace: torch.Tensor | None, tactic: int) -> None:
        self.op = op
        x, B = inputs["x" if op == "ssd_scan" else "u"], inputs["B"]
        self.y = torch.empty_like(x)
        self.final = torch.empty(x.shape[0], *x.shape[2:], B.shape[-1], device=x.device)
        outputs: dict[str, Any] = {"seq_lens": None, "y": self.y, "tactic": tactic, "final_state": self.final}
        if op == "ssd_scan":
            options: dict[str, Any] = {"z": None, "dt_limit": (0.0, float("inf")), "initial_state": None}
            self.params, self.alive = ssd_scan._params(**inputs, **options, **outputs)
        else:
            options = {"state": None, "delta_softplus": True, "reverse": False}
            self.params = selective_scan._params(**inputs, **options, **outputs)
        size_of = getattr(load(), f"mamba_{op}_workspace")
        size_of.restype = ctypes.c_size_t
        size = size_of(ctypes.byref(self.params))
        self.workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if workspace is None else workspace
        self.params.workspace, self.params.workspace_size = self.workspace.data_ptr(), size

    def poison(self, workspace: bool = True) -> None:
        self.y.fill_(float("nan"))
        self.final.fill_(float("nan"))
        if workspace:
            self.workspace.fill_(0xFF)

    def run(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(load(), f"mamba_{self.op}")(ctypes.byref(self.params), stream)
        if status != 0:
            raise KernelError(f"{self.op}: {load().mamba_status_string(status).decode()}")

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.y.view(torch.int16), self.final.view(torch.int32)


def difference(call: Call, first: Sequence[torch.Tensor]) -> str | None:
    """The first place that is not as it was: [batch, token, ...] of y, [batch, ..., state] of the final state."""
    for name, now, then in zip(("y", "final state"), call.bits(), first, strict=True):
        if not torch.equal(now, then):
            where = (now != then).nonzero()
            return f"{name}{where[0].tolist()} and {len(where) - 1} more"
    return None


def tactics_of(op: str, shape: Shape) -> list[int]:
    """A call's own choice; then the two-pass kernels', rows cut or whole, or one of each kind that hands states on."""
    inputs = make(op, shape, 0)
    if op == "ssd_scan":
        found = ssd_scan.ssd_scan_tactics(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))
        return found[:1] + [tactic for tactic in found[1:] if tactic % 16 in (7, 8)]
    found = selective_scan.selective_scan_tactics(*(inputs[name] for name in ("u", "delta", "A", "B", "C", "z")))
    best_of: dict[tuple[int, bool, bool], int] = {}  # kernel, in pieces, pieces in turn
    for tactic in found:
        kernel, pieces = tactic & 15, tactic >> 20 > 1
        best_of.setdefault((kernel, pieces, pieces and tactic >> 17 & 7 > 0), tactic)
    return [tactic for (kernel, *_), tactic in best_of.items() if kernel > 0]  # 0 is the generic kernel


def repeat(op: str, shape: Shape, times: int, tactic: int = -1) -> dict[str, list[str]]:
    """Runs the shape `times` times apart and as often together; says of every run that differed where it did first."""
    inputs = [make(op, shape, seed) for seed in (0, 1)]
    calls = [Call(op, inputs[0], None, tactic)]
    calls += [Call(op, inputs[i % 2], calls[0].workspace, tactic) for i in range(1, IN_A_ROW)]
    expected = []
    for call in calls[:2]:
        call.poison()
        call.run()
        expected.append([bits.clone() for bits in call.bits()])
        if any(not bool(torch.isfinite(t).all()) for t in (call.y, call.final)):
            raise KernelError(f"{op}: {shape}, tactic {tactic}: not finite")
    seen: dict[str, list[str]] = {"apart": [], "together": []}
    for _ in range(times):
        calls[0].poison()
        calls[0].run()
        if found := difference(calls[0], expected[0]):
            seen["apart"].append(found)
    for call in calls:
        call.poison()
    for _ in range(0, times, IN_A_ROW):
        for call in calls:
            call.run()
        seen["together"] += [found for i, call in enumerate(calls) if (found := difference(call, expected[i % 2]))]
        for call in calls:
            call.poison(workspace=False)  # it holds what the row before left
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(SHAPES))
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--tactic", type=int, help="default: a call's own choice, and others that hand states on")
    arguments = parser.parse_args()
    for op in arguments.ops:
        for shape in SHAPES[op]:
            for tactic in tactics_of(op, shape) if arguments.tactic is None else [arguments.tactic]:
                seen = repeat(op, shape, arguments.times, tactic)
                text = ", ".join(
                    f"{len(found)} {how}" + (f" ({found[0]})" if found else "") for how, found in seen.items()
                )
                print(f"{op} {shape} tactic {tactic}: of {arguments.times} runs differ {text}", flush=True)


if __name__ == "__main__":
    main()
