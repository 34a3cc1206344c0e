"""(c) Prefill of 1k, 4k and 16k tokens in stock ONNX Runtime on the CPU: time and memory, which must grow linearly.

    python benchmarks/prefill_scaling.py [--cache FOLDER] [--lengths 1024 4096 16384]

The model and bundle of cpu_decode.py; every length in a process of its own. Memory is what the process holds at its
peak beyond what it holds after a prefill of 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cpu_decode
import machine
import peers


def measure(bundle: Path, length: int, threads: int, repeats: int) -> None:
    """Print time and memory of one length as JSON."""
    sys.path.insert(1, str(cpu_decode.ROOT))
    import contenders

    contender = contenders.Bundle(str(bundle), threads)
    contender.prefill(16)
    held = machine.rss_bytes()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        contender.prefill(length)
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": min(times), "bytes": machine.peak_rss_bytes() - held}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), int(options.measure[1]), options.threads, options.repeats)
        return
    about = machine.describe(("onnxruntime",))
    bundle = cpu_decode.make_bundle(cpu_decode.make_model(options.cache), options.cache)
    print(f"{about}; {options.threads} threads\n")
    print("| tokens | seconds | ms a token | memory beyond the loaded model | KiB a token |\n|---|---|---|---|---|")
    for length in options.lengths:
        command = [sys.executable, __file__, "--measure", str(bundle), str(length)]
        command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        each = f"{1e3 * found['seconds'] / length:.2f}"
        print(
            f"| {length} | {found['seconds']:.2f} | {each} | {found['bytes'] / 2**20:.0f} MiB "
            f"| {found['bytes'] / 1024 / length:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
