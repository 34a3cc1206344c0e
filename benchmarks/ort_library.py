"""Prefill and step on the CPU: the `tensorrt` target with the ONNX Runtime library, and others, in one run.

    python benchmarks/ort_library.py --ckpt FOLDER --bundle FOLDER [--ort-bundle FOLDER] \\
        [--gguf FILE --llama-python PYTHON] [-o ort_library.json]

FOLDER of --ckpt is a Hugging Face Mamba checkpoint, --bundle its export (target tensorrt; --ort-bundle: target ort),
FILE the same weights for llama.cpp, PYTHON an interpreter with llama-cpp-python. Every contender runs in a process of
its own, one after the other, several rounds; what counts is the best of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Timing = dict[str, Any]


def best_of(run: Callable[[], object], repeats: int) -> float:
    """Least wall time of one call, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def transformers(path: str, length: int, threads: int) -> Timing:
    import torch
    from transformers import AutoModelForCausalLM, __version__

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(length)[None] % 1000
    with torch.inference_mode():
        prefill = best_of(lambda: model(ids, use_cache=True, logits_to_keep=1), 2)
        cache = model(ids[:, :8], use_cache=True).cache_params
        step = best_of(lambda: model(ids[:, :1], cache_params=cache, use_cache=True), 20)
    return {"version": __version__, "prefill_ms": prefill, "step_ms": step}


def llama(path: str, length: int, threads: int) -> Timing:
    import llama_cpp

    model = llama_cpp.Llama(
        path,
        n_ctx=2 * length,
        n_batch=length,
        n_ubatch=length,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    ids = [i % 1000 for i in range(length)]

    def prefill() -> None:
        model.reset()
        model.eval(ids)

    timing = best_of(prefill, 4)
    return {"version": llama_cpp.__version__, "prefill_ms": timing, "step_ms": best_of(lambda: model.eval([1]), 60)}


def run_bundle(path: str, length: int, threads: int, library: Path | None) -> Timing:
    import numpy as np
    import onnxruntime

    from mamba_export import Bundle
    from mamba_export.runtime import OrtRunner

    runner = OrtRunner(Bundle(path, check=False), threads=threads, library=library)
    ids = np.arange(length, dtype=np.int64)[None] % 1000
    zero = runner.initial_state(1)
    prefill = best_of(lambda: runner.prefill(ids, zero), 5)
    step = best_of(lambda: runner.step(ids[:, :1], zero), 60)
    return {"version": onnxruntime.__version__, "prefill_ms": prefill, "step_ms": step}


def with_library(path: str, length: int, threads: int) -> Timing:
    import mamba_export

    mamba_export.__path__.append(str(ROOT))
    from mamba_export.plugins import ort_library

    found = ort_library.find()
    if found is None:
        sys.exit("no library: python -m mamba_export.plugins.ort_library --onnxruntime-root DIR")
    return run_bundle(path, length, threads, found)


def without_library(path: str, length: int, threads: int) -> Timing:
    return run_bundle(path, length, threads, None)


CONTENDERS = {
    "transformers": transformers,
    "llama.cpp f32": llama,
    "ort target": without_library,
    "library": with_library,
}


def measure(name: str, python: str, path: Path, length: int, threads: int) -> Timing:
    """One contender in a process of its own."""
    command = [python, __file__, "--contender", name, "--path", str(path), "-p", str(length), "--threads", str(threads)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {name} failed:\n{done.stderr[-2000:]}")
    timing: Timing = json.loads(done.stdout.splitlines()[-1])
    return timing


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--ort-bundle", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("-p", "--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender](options.path, options.length, options.threads)))
        return
    paths = dict(zip(CONTENDERS, (options.ckpt, options.gguf, options.ort_bundle, options.bundle), strict=True))
    results: dict[str, Timing] = {}
    for _ in range(options.rounds):
        for name, path in paths.items():
            if path is None:
                continue
            python = options.llama_python if name.startswith("llama") else sys.executable
            new = measure(name, python, path, options.length, options.threads)
            old = results.setdefault(name, new)
            results[name] = {**new, **{k: min(old[k], new[k]) for k in ("prefill_ms", "step_ms")}}
    report(results, options)


def report(results: dict[str, Timing], options: argparse.Namespace) -> None:
    ours = results.get("library")
    where = f"{processor()}, {options.threads} threads"
    print(f"{where}, prefill of {options.length} tokens, best of {options.rounds} rounds\n")
    print(f"{'':16}{'version':>12}{'prefill ms':>14}{'step ms':>12}{'library is faster by':>24}")
    for name, timing in results.items():
        line = f"{name:16}{timing['version']:>12}{timing['prefill_ms']:14.0f}{timing['step_ms']:12.1f}"
        if ours is not None:
            ratios = (timing[key] / ours[key] for key in ("prefill_ms", "step_ms"))
            line += "{:>14.2f} ×{:>6.2f} ×".format(*ratios)
        print(line)
    if options.output:
        facts = {"processor": processor(), "threads": options.threads, "length": options.length, "results": results}
        options.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
