"""Decoding where memory is short: peak memory of steps, and the cost of the loop around the engine.

    python benchmarks/decode_memory.py [--cache FOLDER] [--bundle BUNDLE]

Steps run on Mamba-1, 768 × 24, vocabulary 50,280, float32, random weights (or on --bundle), with packed weights and in
low memory, each in its own process; then the command `generate --step-only`, which decodes in low memory by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpu_decode
import machine
import peers

ROOT = Path(__file__).resolve().parents[1]

_STEPS = """
import json, sys
from mamba_export import Bundle, OrtRunner
from mamba_export.bench import run_bench
runner = OrtRunner(Bundle(sys.argv[1], check=False), low_memory=sys.argv[2] == "1")
print(json.dumps(run_bench(runner, [], [32], [1], repetitions=3)[0].to_dict()))
"""


def measure(code: str, *args: str) -> Any:
    """What ``code`` prints in a process of its own."""
    command = [sys.executable, "-c", code, *args]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of_command(*args: str) -> int:
    """Peak resident memory of a run of the command line, in bytes."""
    process = subprocess.Popen([sys.executable, "cli.py", *args], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args)
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--bundle", type=Path, help="measure its steps instead")
    options = parser.parse_args()
    bundle = options.bundle or cpu_decode.make_bundle(cpu_decode.make_model(options.cache), options.cache)
    weights = (bundle / "weights.bin").stat().st_size
    print(machine.describe(("onnxruntime",)) + "\n")
    print("| steps | weights | peak memory | above the weights | ms/step p50 | in engine |\n|---|---|---|---|---|---|")
    for name, low in (("packed weights", "0"), ("low memory", "1")):
        m = measure(_STEPS, str(bundle), low)
        above = f"{(m['peak_host'] - weights) / 1e6:.0f} MB"
        speed = f"{m['latency_ms']['p50']:.1f} | {m['engine_share']:.1%}"
        print(f"| {name} | {weights / 1e6:.0f} MB | {m['peak_host'] / 1e6:.0f} MB | {above} | {speed} |")
    ids = ",".join(str(i) for i in range(1, 9))
    peak = peak_of_command("generate", str(bundle), "--tokens", ids, "-n", "32", "--step-only", "--ignore-eos", "-q")
    above = f"{(peak - weights) / 1e6:.0f} MB"
    print(f"| `generate --step-only` | {weights / 1e6:.0f} MB | {peak / 1e6:.0f} MB | {above} | | |")


if __name__ == "__main__":
    main()
