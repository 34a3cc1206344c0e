"""Runs the benchmarks of the ops and writes RESULTS.md: ``python -m kernels.bench.run [op ...]``.

The peer's source packages are looked for in ``--sources`` and downloaded there if missing.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from .harness import Context, copy_bandwidth, table

HERE = Path(__file__).resolve().parent
TITLES = {
    "selective_scan": "batch, channels, tokens",
    "causal_conv1d": "batch, channels, tokens",
    "selective_state_update": "batch, channels",
    "ssd_scan": "batch, heads, tokens",
    "ssd_state_update": "batch, heads",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(TITLES))
    parser.add_argument("--sources", type=Path, default=Path("build/peer"))
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    arguments = parser.parse_args()
    arguments.sources.mkdir(parents=True, exist_ok=True)
    ctx = Context(arguments.sources, arguments.quick, copy_bandwidth())
    name = torch.cuda.get_device_name()
    parts = [
        "# Kernel benchmarks: the last output of `python -m kernels.bench.run`\n",
        f"{name}, {torch.cuda.get_device_properties(0).multi_processor_count} multiprocessors, torch "
        f"{torch.__version__}; copy bandwidth {ctx.copy_bandwidth / 1e12:.2f} TB/s (reads and writes, 1 GiB). "
        "Medians of CUDA-graph replays over rotating buffers; the peer is mamba-ssm 2.3.2.post1 and causal-conv1d "
        "1.7.0, in its own layout, in the same run. Errors are relative to float64 (first 512 tokens of a scan, "
        "4,096 of a convolution).\n",
    ]
    for op in arguments.ops:
        rows = importlib.import_module(f".{op}", __package__).bench(ctx)
        parts.append(f"\n## {op} ({TITLES.get(op, 'shape')})\n\n{table(rows)}\n")
        print(parts[-1], flush=True)
        arguments.out.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
