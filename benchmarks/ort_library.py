"""The ONNX Runtime library on the CPU: the `tensorrt` target through it, against transformers and llama.cpp.

    python benchmarks/ort_library.py [--cache FOLDER] [--only NAME ...] [--rounds 4]

One model (Mamba-1, 768 × 24, vocabulary 50,280, float32, random weights), one run; contenders take turns as in
cpu_decode.py. The library is built if need be, which takes ONNX Runtime's headers under ONNXRUNTIME_ROOT.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import cpu_decode
import machine
import peers

NAMES = ("library", "ort target", "transformers", "llama.cpp")
# What the library is to reach: times faster in a prefill, in a step.
ASKED = {"transformers": (4.0, None), "llama.cpp": (1.4, 1.0)}


def start(name: str, model: Path, options: argparse.Namespace) -> cpu_decode.Process:
    """Set up and load one contender."""
    from mamba_export.export import export_onnx

    if name != "library":
        process = cpu_decode.start("mamba-export" if name == "ort target" else name, model, options)
        process.name = name
        return process
    from mamba_export.plugins import ort_library

    library = ort_library.build()
    out = options.cache / "bundles" / f"{model.name}-tensorrt"
    export_onnx(model, out, target="tensorrt", verify=False, force=True)
    print(f"library {Path(library.path).parent.name}", file=sys.stderr)
    return cpu_decode.Process("library", sys.executable, out, options.threads)


def report(best: dict[str, dict[str, float]], versions: dict[str, str], length: int) -> None:
    """The table, as Markdown, and what was asked for."""
    own = best[NAMES[0]]
    print(f"\n| contender | prefill of {length}, ms | one step, ms | the library is faster: prefill, step | asked |")
    print("|---|---|---|---|---|")
    for name, times in best.items():
        found = [times[key] / own[key] for key in ("prefill", "step")]
        asked = zip(ASKED.get(name, (None, None)), found, strict=True)
        words = " · ".join("–" if a is None else f"{a:.1f} × {'✓' if f >= a else '✗'}" for a, f in asked)
        ratios = " · ".join(f"{f:.2f} ×" for f in found)
        row = (f"{name} ({versions[name]})", f"{times['prefill']:.0f}", f"{times['step']:.1f}", ratios, words)
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("-p", "--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between turns")
    options = parser.parse_args()
    sys.path.insert(1, str(cpu_decode.ROOT))
    from mamba_export.errors import MambaExportError

    about = machine.describe()
    model = cpu_decode.make_model(options.cache)
    running: list[cpu_decode.Process] = []
    absent = []
    try:
        for name in options.only:
            try:
                running.append(start(name, model, options))
            except (RuntimeError, subprocess.CalledProcessError, MambaExportError) as error:
                absent.append(f"{name} is left out: {error}")
        print(f"{about}; {options.threads} threads, best of {options.rounds} rounds")
        best = cpu_decode.take_turns(running, options)
        report(best, {process.name: process.version for process in running}, options.length)
        print("\n".join(absent))
    finally:
        for process in running:
            process.__exit__(None, None, None)


if __name__ == "__main__":
    main()
