"""One million tokens through mamba1-tiny on the CPU: memory that stays flat, and the logits of the run in one piece.

    python benchmarks/long_stream.py [--cache FOLDER] [--tokens 1000000]

Two ways to read that much: a prompt in chunks of 512 tokens, as `generate` does it, and `perplexity --stream` over a
file. Each length is a process of its own, so that its peak memory is its own too. Tokens are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers

ROOT = Path(__file__).resolve().parents[1]

_EQUAL = """
import json, sys
import numpy as np
from mamba_export import Bundle, OrtRunner
runner = OrtRunner(Bundle(sys.argv[1], check=False))
ids = np.random.default_rng(8).integers(0, runner.spec.vocab_size, (1, int(sys.argv[2])))
whole, _ = runner.prefill(ids, runner.initial_state(1))
state, parts = runner.initial_state(1), []
for start in range(0, ids.shape[1], 512):
    logits, state = runner.prefill(np.ascontiguousarray(ids[:, start : start + 512]), state)
    parts.append(logits)
pieces = np.concatenate(parts, axis=1)
relative = np.linalg.norm(pieces - whole) / np.linalg.norm(whole)
same = (pieces.argmax(-1) == whole.argmax(-1)).mean()
print(json.dumps([float(np.abs(pieces - whole).max()), float(np.abs(whole).max()), float(relative), float(same)]))
"""
_PROMPT = """
import json, sys, time
import numpy as np
from mamba_export import Bundle, OrtRunner
from mamba_export.runtime.memory import peak_host
from mamba_export.runtime.prefill import prefill_chunks
runner, state, random = OrtRunner(Bundle(sys.argv[1], check=False)), None, np.random.default_rng(0)
state, started = runner.initial_state(1), time.perf_counter()
for start in range(0, int(sys.argv[2]), 10_000):
    ids = random.integers(0, runner.spec.vocab_size, (1, min(10_000, int(sys.argv[2]) - start)))
    _, state = prefill_chunks(runner, ids, state)
print(json.dumps([peak_host(), time.perf_counter() - started]))
"""
_FILE = """
import json, sys, time
from mamba_export import perplexity
from mamba_export.runtime.memory import peak_host
started = time.perf_counter()
report = perplexity(sys.argv[1], sys.argv[2], stream=True)
print(json.dumps([peak_host(), time.perf_counter() - started, report.tokens]))
"""


def measure(code: str, *args: object) -> Any:
    """What ``code`` prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def tiny_bundle(cache: Path) -> Path:
    """The repository's example, exported anew, with the logits of every position."""
    sys.path.insert(1, str(ROOT))
    from mamba_export.export import export_onnx

    out = cache / "bundles" / "mamba1-tiny-ort-all"
    out.parent.mkdir(parents=True, exist_ok=True)
    example = ROOT / "examples" / "mamba1-tiny"
    export_onnx(example, out, target="ort", logits="all", verify=False, force=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    print(machine.describe(("onnxruntime",)) + "\n")
    bundle = tiny_bundle(options.cache)
    worst, largest, relative, same = measure(_EQUAL, bundle, 8192)
    print(
        f"The first 8,192 tokens in chunks of 512 against one piece: max|Δ| of all logits {worst:.1e} (of up to "
        f"{largest:.0f}), relative {relative:.1e}, the same top token at {same:.2%} of the positions.\n"
    )
    print("| tokens | prompt in chunks: peak memory | tokens/s | `perplexity --stream`: peak memory | tokens/s |")
    print("|---|---|---|---|---|")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in dict.fromkeys((10_000, 100_000, options.tokens)):
            peak, seconds = measure(_PROMPT, bundle, tokens)
            data = Path(folder) / f"{tokens}.bin"
            np.random.default_rng(tokens).integers(0, 4096, tokens).astype("<u2").tofile(data)
            file_peak, file_seconds, read = measure(_FILE, bundle, data)
            peaks.append((peak, file_peak))
            print(
                f"| {tokens:,} | {peak / 1e6:.1f} MB | {tokens / seconds:,.0f} | {file_peak / 1e6:.1f} MB "
                f"| {read / file_seconds:,.0f} |",
                flush=True,
            )
    growth = (max(peak[i] for peak in peaks) - peaks[0][i] for i in range(2))
    print("\nMore than at 10,000 tokens: {:.1f} MB and {:.1f} MB.".format(*(grown / 1e6 for grown in growth)))


if __name__ == "__main__":
    main()
