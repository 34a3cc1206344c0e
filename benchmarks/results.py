"""Run benchmarks and put their output into RESULTS.md, each in its own section; sections not run stay as they are.

    python benchmarks/results.py [--cache FOLDER] [cpu_decode] [prefill_scaling] [long_stream] …

A run that starts on a busy machine (load above 0.5 a core) is marked as preliminary.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import peers

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
TITLES = {
    "export_memory": "(a) Export of a 2.8 B-parameter checkpoint",
    "cpu_decode": "(b), (d) One token and a prefill on the CPU",
    "prefill_scaling": "(c) Prefill of long sequences",
    "decode_memory": "Decoding in little memory",
    "long_stream": "One million tokens in a stream",
    "ort_library": "The ONNX Runtime library on the CPU",
    "against_transformer": "A Transformer of the same size",
    "quantized_decode": "Quantized bundles against llama.cpp",
}
HEADER = "# Last results\n\nWritten by `benchmarks/results.py`: what each script printed, machine and date first.\n"
BUSY = "**Preliminary: other jobs were running on this machine.**\n\n"


def sections() -> dict[str, str]:
    """The sections that RESULTS.md holds, by script."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    parts = re.split(r"^## .*\n+`benchmarks/(\w+)\.py`\n+", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def busy() -> bool:
    """Whether timings taken now are worth little."""
    return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)


def run(script: str, cache: Path, note: str) -> str:
    """Output of one script, after a note."""
    command = [sys.executable, str(FOLDER / f"{script}.py")]
    command += ["--folder" if script == "export_memory" else "--cache", str(cache)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return note + done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scripts", nargs="*", choices=[*TITLES, []], help="all when left out")
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    note = BUSY if busy() else ""
    for script in options.scripts or TITLES:
        output = run(script, options.cache, note)
        kept = {**sections(), script: output}
        body = [f"\n## {TITLES[name]}\n\n`benchmarks/{name}.py`\n\n{kept[name]}\n" for name in TITLES if name in kept]
        RESULTS.write_text(HEADER + "".join(body), encoding="utf-8")
        print(output, end="\n\n")


if __name__ == "__main__":
    main()
