"""Bundles in ONNX Runtime on a GPU, float16: goldens, prefill, and steps as CUDA graphs, against mamba-ssm in one run.

    python benchmarks/gpu_end_to_end.py --prepare BUNDLES [--checkpoints DIR]     on any machine: exports the bundles
    python benchmarks/gpu_end_to_end.py BUNDLES --sources PEER [-o RESULTS-gpu.md]     on the GPU

Bundles: of target `ort`, the stock engine's own ops; of target `tensorrt` with the CUDA library of plugins/onnxruntime
(build it first: python -m mamba_export.plugins.ort_library --cuda); `fused`, the same with `--fuse-step`, whose
step is one node, by the library's choice of kernel and by the chain of kernels alone; and that with int8 weights.
Needs onnxruntime-gpu; PEER holds the source packages of mamba-ssm and causal-conv1d. The 768 x 24 model has random
weights, for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mamba_export  # noqa: E402

if str(ROOT) not in mamba_export.__path__:
    mamba_export.__path__.append(str(ROOT))

MODELS = ("mamba1-tiny", "mamba1-small", "mamba2-small")
BUNDLES: dict[str, dict[str, Any]] = {
    "ort": {"target": "ort"},
    "tensorrt": {"target": "tensorrt"},
    "fused": {"target": "tensorrt", "fuse_step": True},
    "fused-w8a16": {"target": "tensorrt", "fuse_step": True, "recipe": "w8a16"},
}
LABELS = {
    "tensorrt": "`tensorrt` with the library",
    "fused": "the same with `--fuse-step`",
    "chain": "the same, by the chain of kernels",
    "fused-w8a16": "a fused step of int8 weights, `--recipe w8a16`",
    "ort": "`ort`",
}
LARGE = {"d_model": 768, "n_layer": 24, "vocab_size": 50280}
PROMPT, TOKENS = 2048, 256


def large_checkpoint(folder: Path) -> Path:
    """A checkpoint of mamba-130m's shape; its weights repeat a random block, so that it packs small."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    width, inner, rank, state = 768, 1536, 48, 16
    block = torch.randn(4096, generator=torch.Generator().manual_seed(0))

    def normal(*shape: int, scale: float) -> torch.Tensor:
        size = int(np.prod(shape))
        return (block.repeat(-(-size // 4096))[:size] * scale).reshape(shape).half()

    weights = {
        "backbone.embedding.weight": normal(50280, width, scale=0.02),
        "backbone.norm_f.weight": torch.ones(width),
    }
    for i in range(24):
        mixer = {
            "in_proj.weight": normal(2 * inner, width, scale=0.03),
            "conv1d.weight": normal(inner, 1, 4, scale=0.3),
            "conv1d.bias": torch.zeros(inner),
            "x_proj.weight": normal(rank + 2 * state, inner, scale=0.02),
            "dt_proj.weight": normal(inner, rank, scale=0.1),
            "dt_proj.bias": torch.full((inner,), -4.0),
            "A_log": torch.arange(1, state + 1).float().log().repeat(inner, 1),
            "D": torch.ones(inner),
            "out_proj.weight": normal(width, inner, scale=0.005),
        }
        weights[f"backbone.layers.{i}.norm.weight"] = torch.ones(width)
        weights |= {f"backbone.layers.{i}.mixer.{name}": value for name, value in mixer.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(
        json.dumps({**LARGE, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True})
    )
    return folder


def prepare(bundles: Path, checkpoints: Path) -> None:
    """Export every bundle that is not there yet, the goldens beside them."""
    from mamba_export import export_onnx, quantize

    bundles.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        for file in ("golden.npz", "golden_greedy.json"):
            (bundles / f"{name}.{file}").write_bytes((checkpoints / name / file).read_bytes())
    for kind, export in BUNDLES.items():
        for name in (*MODELS, "768x24"):
            out = bundles / f"{name}-{kind}"
            if not out.exists():
                ckpt = checkpoints / name if name in MODELS else large_checkpoint(bundles / "768x24")
                logits = "all" if name in MODELS else "last"
                make = quantize if "recipe" in export else export_onnx
                make(ckpt, out, dtype="fp16", logits=logits, verify=False, **export)
                print(f"exported {out}", flush=True)


def open_runner(bundles: Path, name: str, kind: str) -> Any:
    from mamba_export.plugins import ort_library

    from mamba_export import Bundle
    from mamba_export.runtime import OrtRunner

    if kind != "ort" and ort_library.find(cuda=True) is None:
        sys.exit("no CUDA library: python -m mamba_export.plugins.ort_library --cuda --onnxruntime-root DIR")
    return OrtRunner(Bundle(bundles / f"{name}-{kind}", check=False), device="cuda")


def goldens(bundles: Path, name: str, kind: str) -> str:
    """One row: logits in one piece and in pieces, and greedy texts by the step graph as CUDA graphs."""
    runner = open_runner(bundles, name, kind)
    with np.load(bundles / f"{name}.golden.npz") as data:
        ids, wanted = data["input_ids"].astype(np.int64), data["logits_last64"]
    logits, _ = runner.prefill(ids, runner.initial_state(1))
    found = logits[:, -wanted.shape[1] :]
    state, pieces = runner.initial_state(1), []
    for start, stop in ((0, 1), (1, 3), (3, 66), (66, 131), (131, 191), (191, 192)):
        piece, state = runner.prefill(ids[:, start:stop], state)
        pieces.append(piece)
    split = np.concatenate(pieces, axis=1)[:, -wanted.shape[1] :]
    right = total = texts = 0
    cases = json.loads((bundles / f"{name}.golden_greedy.json").read_text())
    for case in cases:
        _, state = runner.prefill(np.array([case["prompt_ids"][:-1]]), runner.initial_state(1))
        loop, token, same = runner.step_loop(state, 1), case["prompt_ids"][-1], True
        for expected in case["greedy_ids"]:
            token = int(loop.step(np.array([[token]]))[0, -1].argmax())
            same = same and token == expected
            right, total, token = right + (token == expected), total + 1, expected  # goes on from the golden token
        texts += same

    def relative(x: Any) -> float:
        return float(np.linalg.norm(x.astype(np.float64) - wanted) / np.linalg.norm(wanted))

    agree = float((found.argmax(-1) == wanted.argmax(-1)).mean())
    graph = "yes" if runner.cuda_graph else "no"
    return (
        f"| {name} | {kind} | {relative(found):.1e} | {relative(split):.1e} | {agree:.1%} | {right} of {total} "
        f"| {texts} of {len(cases)} | {graph} |"
    )


def times(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call, after three to warm up."""
    found = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return found[3:]


def speeds(bundles: Path, kind: str) -> dict[str, float]:
    """Milliseconds of prefill and of a step; ``chain``: of a fused step by the chain of kernels."""
    os.environ["MAMBA_ORT_DECODE"] = "chain" if kind == "chain" else ""
    runner = open_runner(bundles, "768x24", "fused" if kind == "chain" else kind)
    ids = np.random.default_rng(0).integers(0, 1000, (1, PROMPT))
    zero = runner.initial_state(1)
    prefill = times(lambda: runner.prefill(ids, zero), 20)
    _, state = runner.prefill(ids[:, :16], zero)
    loop = runner.step_loop(state, 1)
    token = np.zeros((1, 1), np.int64)

    def generate() -> None:
        for _ in range(TOKENS):
            token[0, 0] = loop.step(token)[0, 0].argmax()

    generate()
    before = loop.engine_seconds
    step = times(generate, 5)
    engine = 1e3 * (loop.engine_seconds - before) / (8 * TOKENS)
    return {
        "prefill": min(prefill),
        "prefill_median": statistics.median(prefill),
        "step": min(step) / TOKENS,
        "step_engine": engine,
        "graph": float(runner.cuda_graph),
    }


def peer_speeds(sources: Path) -> dict[str, float]:
    import torch
    from mamba_export.kernels.bench import harness, peer_model

    found = {}
    for name in ("float16", "bfloat16"):
        model = peer_model.make(harness.Context(sources), LARGE["d_model"], LARGE["n_layer"], getattr(torch, name))
        found[f"prefill_{name}"] = peer_model.forward_ms(model, PROMPT)
        found[f"step_{name}"] = peer_model.generate_ms(model, tokens=TOKENS)
    try:
        found["prefill_graph"] = peer_model.forward_graph_ms(model, PROMPT)
    except RuntimeError as error:  # what it does can't be captured
        print(f"the peer's forward pass is not captured: {error}", file=sys.stderr)
    return found


def report(rows: list[str], ours: dict[str, dict[str, float]], peer: dict[str, float]) -> str:
    import onnxruntime
    import torch

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    prefill, step = peer["prefill_float16"], peer["step_float16"]
    lines = [
        "# ONNX Runtime on a GPU: the last output of benchmarks/gpu_end_to_end.py",
        "",
        f"{torch.cuda.get_device_name()}, driver {driver}, onnxruntime-gpu {onnxruntime.__version__}, "
        f"torch {torch.__version__} and mamba-ssm 2.3.2.post1 for the peer; everything in one process.",
        "",
        "## Goldens, float16",
        "",
        "Logits relative to the float32 goldens of other implementations, in one prefill and in six pieces; greedy "
        "tokens by the step graph, fed the golden text.",
        "",
        "| model | bundle | logits | in pieces | same likeliest token | greedy tokens | whole texts | CUDA graph |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## Speed, 768 x 24, batch 1, float16",
        "",
        f"Prefill of {PROMPT} tokens and one token of greedy decoding, best of several runs. Ours: a call of the "
        "Python runner, token ids from the host and logits to the host. The peer: `forward` with logits of the last "
        "token, and `generate` with its CUDA graph.",
        "",
        "| | prefill, ms | against the peer | step, ms | of it in the engine | against the peer |",
        "|---|---|---|---|---|---|",
    ]
    for kind, t in ours.items():
        lines.append(
            f"| {LABELS[kind]} | {t['prefill']:.2f} (median {t['prefill_median']:.2f}) "
            f"| {prefill / t['prefill']:.2f} × | {t['step']:.3f} | {t['step_engine']:.3f} | {step / t['step']:.2f} × |"
        )
    lines.append(f"| mamba-ssm, float16 | {prefill:.2f} | 1 | {step:.3f} | | 1 |")
    lines.append(f"| mamba-ssm, bfloat16 | {peer['prefill_bfloat16']:.2f} | | {peer['step_bfloat16']:.3f} | | |")
    if "prefill_graph" in peer:
        lines.append(f"| its forward as a CUDA graph, bfloat16 | {peer['prefill_graph']:.2f} | | | | |")
    if {"ort", "tensorrt"} <= ours.keys():
        ratio = ours["ort"]["prefill"] / ours["tensorrt"]["prefill"]
        lines += ["", f"The library's prefill is {ratio:.1f} × as fast as the `ort` target's."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path)
    parser.add_argument("--prepare", action="store_true", help="export the bundles and stop")
    parser.add_argument("--kinds", nargs="+", choices=list(BUNDLES), default=list(BUNDLES), help="bundles to measure")
    parser.add_argument("--checkpoints", type=Path, default=ROOT.parent / "shared" / "checkpoints")
    parser.add_argument("--sources", type=Path, help="the peer's source packages")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("RESULTS-gpu.md"))
    options = parser.parse_args()
    if options.prepare:
        prepare(options.bundles, options.checkpoints)
        return
    import torch  # noqa: F401  (loads CUDA's libraries, which onnxruntime-gpu finds then)

    rows = []
    for name in MODELS:
        for kind in options.kinds:
            rows.append(goldens(options.bundles, name, kind))
            print(rows[-1], flush=True)
    ours = {}
    for kind in LABELS:
        if ("fused" if kind == "chain" else kind) in options.kinds:
            ours[kind] = speeds(options.bundles, kind)
            print(kind, ours[kind], flush=True)
    peer = peer_speeds(options.sources)
    print(peer, flush=True)
    options.output.write_text(report(rows, ours, peer), encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
