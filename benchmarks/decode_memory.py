"""Decoding where memory is short: peak memory of steps, the cost of the loop around the engine, and a long stream.

    python benchmarks/decode_memory.py [--cache FOLDER] [--bundle BUNDLE] [--stream 50000]

Steps run on Mamba-1, 768 × 24, vocabulary 50,280, float32, random weights (or on --bundle), packed and in low memory,
each in its own process. The stream is the repository's mamba1-tiny, in chunks of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
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
runner = OrtRunner(Bundle(sys.argv[1], check=False), threads=2, low_memory=sys.argv[2] == "1")
print(json.dumps(run_bench(runner, [], [32], [1], repetitions=3)[0].to_dict()))
"""
_STREAM = """
import json, sys
import numpy as np
from mamba_export import Bundle, OrtRunner
from mamba_export.runtime.memory import peak_host
from mamba_export.runtime.prefill import prefill_chunks
runner = OrtRunner(Bundle(sys.argv[1], check=False), threads=2)
state, done, found = runner.initial_state(1), 0, []
for length in (10_000, int(sys.argv[2]) - 10_000):
    ids = np.random.default_rng(length).integers(0, runner.spec.vocab_size, (1, length))
    _, state = prefill_chunks(runner, ids, state)
    done += length
    found.append([done, peak_host()])
print(json.dumps(found))
"""


def measure(code: str, *args: str) -> Any:
    """What ``code`` prints in a process of its own."""
    command = [sys.executable, "-c", code, *args]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def tiny_bundle(cache: Path) -> Path:
    """The repository's example, exported anew."""
    sys.path.insert(1, str(ROOT))
    from mamba_export.export import export_onnx

    out = cache / "bundles" / "mamba1-tiny-ort"
    out.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(ROOT / "examples" / "mamba1-tiny", out, target="ort", verify=False, force=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--bundle", type=Path, help="measure its steps instead")
    parser.add_argument("--stream", type=int, default=50_000, help="tokens")
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
    print("\n| streamed tokens | peak memory |\n|---|---|")
    for tokens, peak in measure(_STREAM, str(tiny_bundle(options.cache)), str(options.stream)):
        print(f"| {tokens:,} | {peak / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
