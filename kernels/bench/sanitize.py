"""Runs a small set of every op under compute-sanitizer: ``python -m kernels.bench.sanitize [memcheck racecheck ...]``.

Every tactic that covers a shape runs once, in place and out of place, with ragged rows. Exits with 1 if a tool reports
anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

OPS = ("causal_conv1d", "selective_scan", "selective_state_update", "ssd_scan", "ssd_state_update")


def cases(op: str) -> Iterator[str]:
    """Runs the op on its shapes, saying which."""
    import torch

    from kernels.causal_conv1d import causal_conv1d
    from kernels.selective_scan import (
        chain_tactic,
        channel_tactic,
        generic_tactic,
        selective_scan,
        selective_scan_tactics,
    )
    from kernels.selective_state_update import selective_state_update
    from kernels.ssd_scan import ssd_scan, ssd_scan_tactics
    from kernels.ssd_state_update import ssd_state_update, ssd_state_update_tactics

    def normal(*size: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(*size, device="cuda").to(dtype)

    f32 = torch.float32
    lens = torch.tensor([70, 33], dtype=torch.int32, device="cuda")
    long_lens = torch.tensor([300, 133], dtype=torch.int32, device="cuda")
    if op == "causal_conv1d":
        for seqlen, channels, width in ((70, 136, 4), (70, 33, 3), (1, 136, 4), (2, 64, 4)):
            state = normal(2, channels, width - 1)
            pieces = (10006, 10008) if width == 4 and seqlen > 1 else ()
            for tactic in (-1, 3, 24, *pieces):
                for rows in (None, lens.clamp(max=seqlen)):
                    x, weight, bias = normal(2, seqlen, channels), normal(channels, width), normal(channels)
                    causal_conv1d(x, weight, bias, state, rows, final_state=state, tactic=tactic)
            yield f"{seqlen} tokens, {channels} channels, width {width}"
    elif op.startswith("selective"):
        update = op == "selective_state_update"
        for dim, d_state, groups, dtype in (
            (72, 16, 1, torch.bfloat16),
            (40, 20, 2, f32),
            (64, 64, 1, torch.float16),
            (40, 8, 1, f32),
            (48, 24, 2, torch.bfloat16),
            (28, 128, 1, torch.bfloat16),
            (24, 200, 1, torch.bfloat16),
        ):
            length = 1 if update else 300 if d_state == 16 else 70  # 300: linked blocks of every kind hand states on
            rows = long_lens if length == 300 else lens
            u, delta, z = (normal(2, length, dim, dtype=dtype) for _ in range(3))
            B, C = (normal(2, length, groups, d_state, dtype=dtype) for _ in range(2))
            A, state = -torch.rand(dim, d_state, device="cuda"), normal(2, dim, d_state, dtype=f32)
            D, bias = normal(dim, dtype=f32), normal(dim, dtype=f32)
            if update:
                selective_state_update(u, delta, A, B, C, D, bias, state, z, final_state=state)
                selective_state_update(u, delta, A, B, C, D, bias, state, z, tactic=0)
            else:
                # the last ones: rows in pieces, which the selector lists for other shapes, in turn and side by side
                in_pieces = [channel_tactic(3, 2), channel_tactic(3)] if d_state == 16 else [generic_tactic(3)]
                for tactic in [*selective_scan_tactics(u, delta, A, B, C, z), *in_pieces]:
                    selective_scan(u, delta, A, B, C, D, bias, state, z, rows, tactic=tactic)
            yield f"{dim} channels, {d_state} states, {dtype}"
        if not update:  # blocks that take several lots of channels
            u, delta, z = (normal(20, 70, 320) for _ in range(3))
            B, C = (normal(20, 70, 1, 16) for _ in range(2))
            A, state = -torch.rand(320, 16, device="cuda"), normal(20, 320, 16, dtype=f32)
            for tactic in (chain_tactic(4, 5, 3, 1), chain_tactic(2, 3, 5, 1)):
                selective_scan(u, delta, A, B, C, None, None, state, z, tactic=tactic)
            yield "320 channels of 20 rows"
    else:
        update = op == "ssd_state_update"
        for nheads, headdim, d_state, dtype in (
            (3, 64, 128, torch.bfloat16),
            (2, 80, 64, torch.float16),
            (3, 64, 256, torch.bfloat16),
            (2, 64, 128, f32),
            (2, 33, 20, f32),
            (2, 40, 96, torch.bfloat16),
            (2, 72, 128, torch.bfloat16),
        ):
            length = 1 if update else 300 if headdim in (64, 72) else 70
            x, z = (normal(2, length, nheads, headdim, dtype=dtype) for _ in range(2))
            B, C = (normal(2, length, 1, d_state, dtype=dtype) for _ in range(2))
            dt, A = normal(2, length, nheads, dtype=dtype), -torch.rand(nheads, device="cuda")
            D, bias, state = (
                normal(nheads, dtype=f32),
                normal(nheads, dtype=f32),
                normal(2, nheads, headdim, d_state, dtype=f32),
            )
            if update:
                for tactic in ssd_state_update_tactics(x, dt, A, B, C, state):
                    ssd_state_update(x, dt, A, B, C, D, bias, state, z, final_state=state, tactic=tactic)
            else:
                lens = torch.tensor([length, length // 2 - 2], dtype=torch.int32, device="cuda")
                for tactic in ssd_scan_tactics(x, dt, A, B, C)[:24]:
                    ssd_scan(x, dt, A, B, C, D, z, bias, True, initial_state=state, seq_lens=lens, tactic=tactic)
            yield f"{nheads} heads of {headdim}, {d_state} states, {dtype}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", default=["memcheck", "racecheck"])
    parser.add_argument("--ops", nargs="*", default=list(OPS))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        import torch

        for case in cases(arguments.inside):
            torch.cuda.synchronize()
            print(f"{arguments.inside}: {case}", flush=True)
        return 0
    failed = 0
    for tool in arguments.tools:
        for op in arguments.ops:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "5"]
            inside = [sys.executable, "-m", "kernels.bench.sanitize", "--inside", op]
            done = subprocess.run([*command, *inside], capture_output=True, text=True)
            print(f"{tool} {op}: {'clean' if done.returncode == 0 else 'NOT CLEAN'}", flush=True)
            if done.returncode:
                failed += 1
                print((done.stdout + done.stderr)[-3000:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
