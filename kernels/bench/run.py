"""Runs the benchmarks of the ops and writes RESULTS.md: ``python -m kernels.bench.run [op ...]``.

A section of RESULTS.md is replaced when its op ran; the others stay as they are, each with its machine named.

The peer's source packages are looked for in ``--sources`` and downloaded there if missing.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import torch

from .harness import Context, Row, copy_bandwidth, table

HERE = Path(__file__).resolve().parent
TITLES = {
    "selective_scan": "batch, channels, tokens",
    "causal_conv1d": "batch, channels, tokens",
    "selective_state_update": "batch, channels",
    "ssd_scan": "batch, heads, tokens",
    "ssd_state_update": "batch, heads",
}


HEADER = """# Kernel benchmarks: the last output of `python -m kernels.bench.run`

Medians of CUDA-graph replays over rotating buffers; the peer is mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0, in its
own layout, in the same run. Errors are relative to float64 (first 512 tokens of a scan, 4,096 of a convolution). Copy
bandwidth counts reads and writes of 1 GiB; "copy ms" is an elementwise copy of as many bytes as the op moves.
"""


def sections(text: str) -> dict[str, str]:
    """The section of each op in a results file."""
    found = re.findall(r"^## (\w+).*?(?=^#{1,2} |\Z)", text, re.DOTALL | re.MULTILINE)
    bodies = re.findall(r"^## \w+.*?(?=^#{1,2} |\Z)", text, re.DOTALL | re.MULTILINE)
    return {op: body.strip() + "\n" for op, body in zip(found, bodies, strict=True)}


def render(parts: dict[str, str]) -> str:
    """A results file: the ops in their usual order, others after them."""
    order = [*(op for op in TITLES if op in parts), *(op for op in parts if op not in TITLES)]
    return "\n".join([HEADER, *(parts[op] for op in order)])


def put_section(out: Path, name: str, body: str) -> None:
    """Replaces a section of a results file, or adds it; the others stay."""
    parts = sections(out.read_text(encoding="utf-8")) if out.is_file() else {}
    parts[name] = body
    out.write_text(render(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(TITLES))
    parser.add_argument("--sources", type=Path, default=Path("build/peer"))
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    arguments = parser.parse_args()
    arguments.sources.mkdir(parents=True, exist_ok=True)
    ctx = Context(arguments.sources, arguments.quick, copy_bandwidth())
    machine = (
        f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).multi_processor_count} multiprocessors, "
        f"torch {torch.__version__}; copy bandwidth {ctx.copy_bandwidth / 1e12:.2f} TB/s."
    )
    for op in arguments.ops:
        rows: list[Row] = []
        bench = importlib.import_module(f".{op}", __package__).bench
        for row in bench(ctx):  # row by row: a run that is cut off leaves what it measured
            rows.append(row)
            text = table(rows)
            put_section(arguments.out, op, f"## {op} ({TITLES.get(op, 'shape')})\n\n{machine}\n\n{text}\n")
            print(text.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
