"""Whether ssd_scan gives the same bits every time: ``python -m kernels.bench.repeat``, on a GPU, a few seconds.

Apart: before every call y, the final state and the workspace are filled with NaN. Together: calls in a row without a
wait or a fill between them, by turns on two inputs in one workspace, where what the call before left would show.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ..library import KernelError, load
from ..ssd_scan import _params, ssd_scan_tactics
from .ssd_scan import make

SHAPES = ((1, 80, 8192), (8, 80, 2048), (1, 80, 2048), (1, 24, 2048))
IN_A_ROW = 8


class Call:
    """One call of ssd_scan on its own outputs, in a workspace that may be shared."""

    def __init__(self, inputs: dict[str, Any], workspace: torch.Tensor | None, tactic: int) -> None:
        x, B = inputs["x"], inputs["B"]
        self.y = torch.empty_like(x)
        self.final = torch.empty(x.shape[0], *x.shape[2:], B.shape[-1], device=x.device)
        self.params, self.alive = _params(
            **inputs, z=None, dt_limit=(0.0, float("inf")), initial_state=None, seq_lens=None, y=self.y,
            final_state=self.final, tactic=tactic,
        )  # fmt: skip
        size_of = load().mamba_ssd_scan_workspace
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
        status = load().mamba_ssd_scan(ctypes.byref(self.params), stream)
        if status != 0:
            raise KernelError(f"ssd_scan: {load().mamba_status_string(status).decode()}")

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.y.view(torch.int16), self.final.view(torch.int32)


def difference(call: Call, first: Sequence[torch.Tensor]) -> str | None:
    """The first place, [batch, token, head, channel] or [batch, head, channel, state], that is not as it was."""
    for name, now, then in zip(("y", "final state"), call.bits(), first, strict=True):
        if not torch.equal(now, then):
            where = (now != then).nonzero()
            return f"{name}{where[0].tolist()} and {len(where) - 1} more"
    return None


def tactics_of(shape: tuple[int, int, int]) -> list[int]:
    """A call's own choice, and the two-pass kernels', in one pair of launches or several, rows cut or whole."""
    inputs = make(*shape, torch.bfloat16, 0)
    found = ssd_scan_tactics(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))
    return found[:1] + [tactic for tactic in found[1:] if tactic % 16 in (7, 8)]


def repeat(shape: tuple[int, int, int], times: int, tactic: int = -1) -> dict[str, list[str]]:
    """Runs the shape `times` times apart and as often together; says of every run that differed where it did first."""
    inputs = [make(*shape, torch.bfloat16, seed) for seed in (0, 1)]
    calls = [Call(inputs[0], None, tactic)]
    calls += [Call(inputs[i % 2], calls[0].workspace, tactic) for i in range(1, IN_A_ROW)]
    expected = []
    for call in calls[:2]:
        call.poison()
        call.run()
        expected.append([bits.clone() for bits in call.bits()])
        if any(not bool(torch.isfinite(t).all()) for t in (call.y, call.final)):
            raise KernelError(f"ssd_scan: {shape}, tactic {tactic}: not finite")
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
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--tactic", type=int, help="default: a call's own choice, and the two-pass kernels'")
    arguments = parser.parse_args()
    for shape in SHAPES:
        for tactic in tactics_of(shape) if arguments.tactic is None else [arguments.tactic]:
            seen = repeat(shape, arguments.times, tactic)
            text = ", ".join(f"{len(found)} {how}" + (f" ({found[0]})" if found else "") for how, found in seen.items())
            print(f"{shape} tactic {tactic}: of {arguments.times} runs differ {text}", flush=True)


if __name__ == "__main__":
    main()
