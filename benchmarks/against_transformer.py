"""A Mamba against a Transformer of the same size on the CPU: speed against batch and context, memory against context.

    python benchmarks/against_transformer.py [--cache FOLDER] [--docs FOLDER] [--contexts 512 …] [--batches 1 …]

Mamba-1 768 × 24 (129 M parameters) and a GPT 768 × 12 (124 M, see transformer.py), both float32 with random weights,
both exported by this project's tracer, both in stock ONNX Runtime with their states or caches bound in place. Every
point is a process of its own: it begins with a context that has been read (states or caches of that size, of random
content), and either reads the last 512 tokens of it again or makes 16 tokens one by one.

``--docs`` (docs/ by default) receives the page's table and pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_decode
import machine
import numpy as np
import peers
import results
import transformer

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"mamba": "Mamba-1 768 × 24", "transformer": "GPT 768 × 12"}
CHUNK, STEPS, WARM_UP = 512, 16, 3
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)
AT = 1024
BEGIN, END = "<!-- written by benchmarks/against_transformer.py -->", "<!-- end -->"
Point = dict[str, Any]


def measure(name: str, folder: Path, what: str, context: int, batch: int, threads: int) -> Point:
    """In this process: time of a chunk that ends at ``context``, or of steps after it and the peak memory."""
    sys.path.insert(1, str(ROOT))
    from mamba_export.runtime.memory import peak_host

    chunk = np.random.default_rng(1).integers(0, 50280, (batch, CHUNK))
    state_bytes, read, step = (_transformer if name == "transformer" else _mamba)(folder, context, batch, threads)
    if what == "read":
        read(chunk)
        return {"chunk_seconds": min(_timed(lambda: read(chunk)) for _ in range(2))}
    token = chunk[:, :1].copy()
    times = [_timed(lambda: step(token)) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    return {"step_seconds": statistics.median(times), "state_bytes": state_bytes, "peak": peak_host()}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _transformer(folder: Path, context: int, batch: int, threads: int) -> tuple[int, Any, Any]:
    shape = transformer.Shape()
    room = context + WARM_UP + STEPS
    runner = transformer.CachedRunner(folder, shape, batch, room, threads)
    position = [context]

    def step(token: Any) -> None:
        runner.run(token, position[0])
        position[0] += 1

    return batch * context * shape.cache_bytes, lambda ids: runner.run(ids, context - CHUNK), step


def _mamba(folder: Path, context: int, batch: int, threads: int) -> tuple[int, Any, Any]:
    from mamba_export import Bundle, OrtRunner

    bundle = Bundle(folder, check=False)
    runner = OrtRunner(bundle, threads=threads)
    random = np.random.default_rng(0)
    arrays = {s.name: 0.1 * random.standard_normal((batch, *s.shape), dtype=np.float32) for s in bundle.states}
    state, loops = runner.state_from_numpy(arrays), {}

    def step(token: Any) -> None:
        if not loops:
            loops[0] = runner.step_loop(state, batch)
        loops[0].step(token)

    return sum(a.nbytes for a in arrays.values()), lambda ids: runner.prefill(ids, state), step


def in_process(name: str, folder: Path, context: int, batch: int, threads: int) -> Point:
    """One point of the tables. ONNX Runtime's attention continues no batch by more than a token: it reads alone."""
    point: Point = {"model": name, "context": context, "batch": batch}
    for what in ("read", "step") if batch == 1 else ("step",):
        command = [sys.executable, __file__, "--measure", name, str(folder), what, str(context), str(batch)]
        command += ["--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        point.update(json.loads(done.stdout.splitlines()[-1]))
    return point


def tables(points: list[Point], contexts: list[int], batches: list[int]) -> str:
    """Both tables, as Markdown."""
    by_place = {(p["model"], p["context"], p["batch"]): p for p in points}
    lines = [
        "| context, batch 1 | Mamba: tokens/s | reading, tokens/s | state | peak memory "
        "| GPT: tokens/s | reading, tokens/s | cache | peak memory |",
        "|---" * 9 + "|",
    ]
    for context in contexts:
        cells = [f"{context:,}"]
        for name in NAMES:
            p = by_place[name, context, 1]
            cells += [f"{1 / p['step_seconds']:.1f}", f"{CHUNK / p['chunk_seconds']:.0f}"]
            cells += [f"{p['state_bytes'] / 1e6:,.1f} MB", f"{p['peak'] / 1e6:,.0f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| batch, context {AT:,} | Mamba: tokens/s | states | peak memory | GPT: tokens/s | cache | peak memory |",
        "|---" * 7 + "|",
    ]
    for batch in batches:
        cells = [str(batch)]
        for name in NAMES:
            p = by_place[name, AT, batch]
            cells += [f"{batch / p['step_seconds']:.1f}", f"{p['state_bytes'] / 1e6:,.0f} MB"]
            cells.append(f"{p['peak'] / 1e6:,.0f} MB")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: list[Point], folder: Path) -> str:
    """Write the pictures; returns the lines of Markdown that show them."""
    sys.path.insert(1, str(ROOT))
    from mamba_export.verification.charts import Chart, Series

    def series(along: str, value: Callable[[Point], float]) -> list[Series]:
        found = []
        for name, title in NAMES.items():
            fixed = {"context": "batch", "batch": "context"}[along]
            chosen = [p for p in points if p["model"] == name and p[fixed] == (1 if fixed == "batch" else AT)]
            chosen.sort(key=lambda p: p[along])
            found.append(Series(title, [p[along] for p in chosen], [value(p) for p in chosen]))
        return found

    pictures = {
        "decode-context": Chart(
            "Decoding, batch 1",
            "tokens of context",
            "tokens/s",
            series("context", lambda p: 1 / p["step_seconds"]),
            True,
        ),
        "decode-batch": Chart(
            f"Decoding after {AT:,} tokens of context",
            "batch",
            "tokens/s, all rows",
            series("batch", lambda p: p["batch"] / p["step_seconds"]),
            log_x=True,
        ),
        "read-context": Chart(
            "Reading 512 more tokens, batch 1",
            "tokens of context",
            "tokens/s",
            series("context", lambda p: CHUNK / p["chunk_seconds"]),
            log_x=True,
        ),
        "memory-context": Chart(
            "Peak memory of the process, batch 1",
            "tokens of context",
            "MB",
            series("context", lambda p: p["peak"] / 1e6),
            log_x=True,
        ),
    }
    for name, chart in pictures.items():
        (folder / f"{name}.svg").write_text(chart.svg(standalone=True) + "\n", encoding="utf-8")
    return "\n".join(f"![{chart.title}]({folder.name}/{name}.svg)" for name, chart in pictures.items())


def into_page(page: Path, text: str) -> None:
    """Replace what the page shows between the two marks."""
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, folder, what, context, batch = options.measure
        print(json.dumps(measure(name, Path(folder), what, int(context), int(batch), options.threads)))
        return
    about, note = machine.describe(("onnxruntime",)), results.BUSY if results.busy() else ""
    gpt = options.cache / "models" / "gpt-768x12"
    sys.path.insert(1, str(ROOT))
    transformer.export(gpt)
    folders = {"mamba": cpu_decode.make_bundle(cpu_decode.make_model(options.cache), options.cache), "transformer": gpt}
    places = dict.fromkeys([*((c, 1) for c in options.contexts), *((AT, b) for b in options.batches)])
    points = [in_process(name, folders[name], *place, options.threads) for place in places for name in NAMES]
    text = f"{about}; {options.threads} threads\n\n{tables(points, options.contexts, options.batches)}"
    print(text)
    if options.docs.is_dir():
        (options.docs / "transformer").mkdir(exist_ok=True)
        pictures = draw(points, options.docs / "transformer")
        into_page(options.docs / "transformer.md", f"{pictures}\n\n{note}{text}")


if __name__ == "__main__":
    main()
