"""What quantization costs and saves: perplexity through exported bundles in ONNX Runtime, against the float bundle.

    python benchmarks/quantization.py --shared ../shared [--windows 64] [--models mamba1-small] [--recipes w8a8 w4a8]

Each checkpoint is calibrated on calibration.bin alone, quantized by every recipe for target ``ort``, and measured on
the same windows of eval.bin as its float bundle. An int8 state is measured token by token through the step graph, which
rounds the state at every one. Sizes are of the linear layers' stored bytes against two bytes a value. The simulated
torch model is measured on the first ``--simulated`` windows, with the bundle on the same. Writes QUANTIZATION.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("w8a16", "w8a8", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a8", "fp8")
MODELS = ("mamba1-small", "mamba2-small")
# Percent of perplexity, and bytes of the linear layers against float16, that a recipe should stay below.
ASKED = {
    "w8a16": (0.05, 0.52),
    "w8a8": (0.5, 0.52),
    "w4a16-g128": (1.0, 0.28),
    "w4a16-g32": (0.7, 0.31),
    "w4a8": (1.5, 0.30),
}
ASKED_MAMBA2 = {"w8a8": 0.2}
WINDOW = 1024


def linear_bytes(path: Path) -> tuple[int, int]:
    """Stored bytes of the linear layers of a bundle, and what they take in float16."""
    import onnx

    from mamba_export.bundle import STEP, Bundle
    from mamba_export.checkpoint import expected_tensors

    graph = onnx.load(path / STEP, load_external_data=False).graph
    stored = 0
    for tensor in graph.initializer:
        if "proj.weight" in tensor.name or "proj.smooth" in tensor.name:
            stored += sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    shapes = expected_tensors(Bundle(path, check=False).spec)
    return stored, 2 * sum(int(np.prod(shape)) for name, shape in shapes.items() if name.endswith("proj.weight"))


def make(ckpt: Path, out: Path, recipe: str, stats: Path) -> Any:
    """A bundle of target ort with the logits of all positions, and the quantized model in it."""
    from mamba_export.calibration import load_statistics
    from mamba_export.calibration.quantizer import quantize_model

    from mamba_export.checkpoint import open_checkpoint
    from mamba_export.export import make_graphs, write_graphs
    from mamba_export.progress import silent

    with open_checkpoint(ckpt) as checkpoint:
        model = quantize_model(checkpoint, recipe, load_statistics(stats), blocks=True)
        graphs = make_graphs(checkpoint, "ort", "fp32", "all", False, silent, model)
        write_graphs(checkpoint, graphs, out, False, True, silent)
    return model


def simulated(ckpt: Path, bundle: Path, model: Any, rows: Any) -> float:
    """Percent between the perplexities of the bundle and of the simulated torch model, on a few rows."""
    import torch
    from mamba_export.calibration import simulate
    from mamba_export.calibration.scans import fast_scans

    from mamba_export.bundle import Bundle
    from mamba_export.checkpoint import open_checkpoint
    from mamba_export.runtime import OrtRunner
    from mamba_export.states import state_table
    from mamba_export.verification.perplexity import measure

    found = measure(OrtRunner(Bundle(bundle, check=False)), rows, "all").perplexity
    total = 0.0
    with open_checkpoint(ckpt) as checkpoint:
        torch_model = simulate(checkpoint, model)
        with torch.inference_mode(), fast_scans():
            for row in torch.from_numpy(rows):
                states = [torch.zeros(1, *s.shape) for s in state_table(checkpoint.spec, "fp32")]
                logits = torch_model(row[None, :-1], states)[0][0]
                total += float(torch.nn.functional.cross_entropy(logits, row[1:]))
    return 100 * (found / float(np.exp(total / len(rows))) - 1)


def measure_model(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table of one checkpoint."""
    from mamba_export import calibrate, export_onnx, perplexity, quantize
    from mamba_export.bundle import Bundle
    from mamba_export.data import cut_windows, read_tokens
    from mamba_export.runtime import OrtRunner
    from mamba_export.verification.perplexity import measure

    ckpt, data = options.shared / "checkpoints" / name, options.shared / "data"
    folder = options.cache / "quantization" / name
    folder.mkdir(parents=True, exist_ok=True)
    tokens = read_tokens(data / "eval.bin", 1 << 16)
    stats = folder / "calib.safetensors"
    started = time.monotonic()
    calibrate(ckpt, data / "calibration.bin", stats, force=True)
    say(f"{name}: calibrated in {time.monotonic() - started:.0f} s")
    export_onnx(ckpt, folder / "float", target="ort", logits="all", verify=False, force=True)
    base = perplexity(folder / "float", tokens, window=WINDOW, limit=options.windows).perplexity
    rows = [[name, "float32", f"{base:.4f}", "", "", "1", "", ""]]
    say(f"{name}: float {base:.4f}")
    few = cut_windows(tokens, WINDOW, options.simulated)
    for recipe in options.recipes:
        started = time.monotonic()
        out = folder / recipe
        model = make(ckpt, out, recipe, stats)
        took = time.monotonic() - started
        found = perplexity(out, tokens, window=WINDOW, limit=options.windows).perplexity
        stored, half = linear_bytes(out)
        limit, ratio = ASKED.get(recipe, (None, None))
        limit = ASKED_MAMBA2.get(recipe, limit) if name.startswith("mamba2") else limit
        off = simulated(ckpt, out, model, few) if options.simulated else float("nan")
        rows.append(
            [
                name,
                recipe,
                f"{found:.4f}",
                f"{100 * (found / base - 1):+.3f} %",
                "" if limit is None else f"{limit} %",
                f"{stored / half:.3f}" + ("" if ratio is None else f" ({ratio})"),
                f"{off:+.3f} %",
                f"{took:.0f} s",
            ]
        )
        say(" | ".join(rows[-1]))
    if options.steps:
        steps = cut_windows(tokens, WINDOW, options.steps)
        ends = []
        for state in ("fp32", "int8"):
            out = folder / f"state-{state}"
            quantize(ckpt, out, recipe="w8a16", state=state, target="ort", verify=False, force=True)
            ends.append(measure(OrtRunner(Bundle(out, check=False), threads=1), steps, "last").perplexity)
        increase = f"{100 * (ends[1] / ends[0] - 1):+.3f} %"
        rows.append([name, "w8a16 + int8 state, by steps", f"{ends[1]:.4f}", increase, "0.3 %", "", "", ""])
        say(" | ".join(rows[-1]))
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mamba-export" / "benchmarks")
    parser.add_argument("--windows", type=int, help="of eval.bin; all when left out")
    parser.add_argument("--simulated", type=int, default=8, help="windows for the simulated torch model; 0: none")
    parser.add_argument("--steps", type=int, default=16, help="windows by steps, for the int8 state; 0: none")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "benchmarks" / "QUANTIZATION.md")
    options = parser.parse_args()
    sys.path.insert(1, str(ROOT))
    started, load = time.monotonic(), os.getloadavg()[0]
    rows = [row for name in options.models for row in measure_model(name, options)]
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("onnxruntime", "torch", "onnx"))
    windows = "all windows" if options.windows is None else f"the first {options.windows} windows"
    lines = [
        "# Quantization: perplexity and size",
        "",
        f"`python benchmarks/quantization.py`, {datetime.date.today():%Y-%m-%d}: {platform.machine()}, "
        f"{os.cpu_count()} cores, load {load:.1f} at the start, {time.monotonic() - started:.0f} s; {versions}.",
        "",
        f"Perplexity through the bundle in ONNX Runtime on {windows} of 1,024 tokens of eval.bin; calibrated on "
        "calibration.bin only. In brackets and under *at most* what was asked for.",
        "",
        "| checkpoint | recipe | perplexity | increase | at most | linear layers / fp16 | bundle − torch | quantize |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
