"""Where the time of a kernel goes, by Nsight Compute: ``python -m kernels.bench.profile [op ...]``.

Profiles the scans at the shapes whose targets they miss and puts the section "profiles" into RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .run import HERE, put_section, sections

CASES = (
    ("selective_scan", (1, 1536, 512)),
    ("selective_scan", (1, 1536, 2048)),
    ("selective_scan", (1, 5120, 2048)),
    ("selective_scan", (8, 5120, 2048)),
    ("selective_scan", (1, 1536, 1048576)),
    ("ssd_scan", (1, 24, 2048)),
    ("ssd_scan", (1, 80, 2048)),
    ("ssd_scan", (1, 80, 8192)),
)
NCU = ["ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off"]
NCU += ["--kernel-name-base", "demangled", "-k", "regex:mamba"]
COLUMNS = {
    "us": "gpu__time_duration.sum",
    "blocks": "launch__grid_size",
    "warps a multiprocessor": "sm__warps_active.avg.per_cycle_active",
    "instructions a clock": "sm__inst_issued.avg.per_cycle_active",
    "special function": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")
EXPLANATION = """One launch under Nsight Compute, clocks as they are (with cold caches, longer than in a table). Shares
are of the peak while a multiprocessor is active; of shared memory and DRAM, of the whole time; instructions a clock,
of the four a multiprocessor can issue while it is active. Stalls: the three commonest reasons, in warps per issued
instruction. What binds a kernel, by these and by what was tried: NOTES-selective-scan.md, NOTES-ssd-scan.md.
"""


def run_case(op: str, shape: tuple[int, ...]) -> None:
    """Calls the op three times, the last one for ncu."""
    bench = importlib.import_module(f"kernels.bench.{op}")
    function = getattr(importlib.import_module(f"kernels.{op}"), op)
    inputs = bench.make(*shape, 0) if op == "selective_scan" else bench.make(*shape, torch.bfloat16, 0)
    for _ in range(2):
        function(**inputs)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    function(**inputs)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def measure(op: str, shape: tuple[int, ...], folder: Path) -> list[dict[str, str]]:
    """The raw metrics of every kernel of the op's last call."""
    report = folder / "report"
    inside = [sys.executable, "-m", "kernels.bench.profile", "--inside", op, *map(str, shape)]
    subprocess.run([*NCU, "-f", "-o", str(report), *inside], check=True, capture_output=True, text=True)
    raw = ["ncu", "-i", f"{report}.ncu-rep", "--page", "raw", "--csv", "--print-units", "base"]  # ns at any size
    text = subprocess.run(raw, check=True, capture_output=True, text=True).stdout
    return [row for row in csv.DictReader(io.StringIO(text)) if row.get("ID", "").isdigit()]  # not that of the units


def line(case: str, row: dict[str, str]) -> str:
    def value(name: str) -> str:
        try:
            number = float(row[name].replace(",", ""))
            return f"{number / 1e3 if name == COLUMNS['us'] else number:.1f}"
        except (KeyError, ValueError):
            return "–"

    stalls: list[tuple[float, str]] = []
    for name, text in row.items():
        if name and name.startswith(STALL[0]) and name.endswith(STALL[1]) and text:
            stalls.append((float(text.replace(",", "")), name.removeprefix(STALL[0]).removesuffix(STALL[1])))
    worst = ", ".join(f"{reason.replace('_', ' ')} {ratio:.1f}" for ratio, reason in sorted(stalls, reverse=True)[:3])
    kernel = row["Kernel Name"].split("<")[0].split("(")[0].split("::")[-1].split()[-1]
    return f"| {case} | {kernel} | " + " | ".join(value(name) for name in COLUMNS.values()) + f" | {worst} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="only these; the rows of others stay (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        op, *shape = arguments.inside
        return run_case(op, tuple(map(int, shape)))
    lines = [
        "| case | kernel | " + " | ".join(COLUMNS) + " | stalls |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    before = sections(arguments.out.read_text(encoding="utf-8")).get("profiles", "") if arguments.out.is_file() else ""
    with tempfile.TemporaryDirectory() as folder:
        for op, shape in CASES:
            case = f"{op} {', '.join(map(str, shape))}"
            if arguments.ops and op not in arguments.ops:
                lines += [row for row in before.splitlines() if row.startswith(f"| {case} |")]
                continue
            found = measure(op, shape, Path(folder))
            lines += [line(case, row) for row in found]
            print("\n".join(lines[-len(found) :]), flush=True)
    body = f"## profiles\n\n{torch.cuda.get_device_name()}. {EXPLANATION}\n" + "\n".join(lines) + "\n"
    put_section(arguments.out, "profiles", body)


if __name__ == "__main__":
    main()
