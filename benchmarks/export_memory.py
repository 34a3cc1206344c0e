"""(a) Export of a 2.8 B-parameter float16 checkpoint: peak memory and the time of every stage.

    python benchmarks/export_memory.py [--folder FOLDER] [--layers 64] [--keep]

Makes a sharded Hugging Face checkpoint (Mamba-1, 2560 × 64, random weights, 5.5 GB), exports it for TensorRT in float16
in a process of its own, and removes both. The export does not verify: verification loads a second model, the oracle,
whose memory is not the exporter's. Peak memory is the process's largest resident size, mapped clean pages included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 2_000_000_000
VOCABULARY, D_STATE, D_CONV = 50280, 16, 4
Shapes = list[tuple[str, tuple[int, ...]]]


def shapes_of(d_model: int, layers: int) -> Shapes:
    """Names and shapes in transformers' ``mamba`` layout."""
    d_inner, rank = 2 * d_model, d_model // 16
    shapes: Shapes = [("backbone.embeddings.weight", (VOCABULARY, d_model))]
    mixer: Shapes = [
        ("A_log", (d_inner, D_STATE)),
        ("D", (d_inner,)),
        ("conv1d.bias", (d_inner,)),
        ("conv1d.weight", (d_inner, 1, D_CONV)),
        ("dt_proj.bias", (d_inner,)),
        ("dt_proj.weight", (d_inner, rank)),
        ("in_proj.weight", (2 * d_inner, d_model)),
        ("out_proj.weight", (d_model, d_inner)),
        ("x_proj.weight", (rank + 2 * D_STATE, d_inner)),
    ]
    for i in range(layers):
        layer = f"backbone.layers.{i}."
        shapes.append((f"{layer}norm.weight", (d_model,)))
        shapes += [(f"{layer}mixer.{name}", shape) for name, shape in mixer]
    return [*shapes, ("backbone.norm_f.weight", (d_model,))]


def make_checkpoint(folder: Path, d_model: int, layers: int) -> int:
    """Write the checkpoint tensor by tensor, and return its size in bytes."""
    folder.mkdir(parents=True)
    shards: list[Shapes] = [[]]
    used = 0
    for name, shape in shapes_of(d_model, layers):
        nbytes = 2 * math.prod(shape)
        if used + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += nbytes
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22, np.float32)).astype(np.float16)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, noise)
        weight_map.update({name: file for name, _ in shard})
    size = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": layers,
        "state_size": D_STATE,
        "conv_kernel": D_CONV,
        "time_step_rank": d_model // 16,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return size


def write_shard(path: Path, shard: Shapes, noise: np.ndarray) -> None:  # type: ignore[type-arg]
    """One safetensors file of slices of ``noise``."""
    header, offset = {}, 0
    for name, shape in shard:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (_, shape) in enumerate(shard):
            left = math.prod(shape)
            start = (i * 7919) % noise.size
            while left:
                part = noise[start : start + left]
                file.write(part.data)
                left, start = left - part.size, 0


class Stages:
    """A progress object that times the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        begin, cpu = time.perf_counter(), time.process_time()
        yield lambda amount: None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu


def export(folder: Path, out: Path) -> None:
    """Run the export in this process and print what it took as JSON."""
    sys.path.insert(1, str(ROOT))
    begin = time.perf_counter()
    from mamba_export.export import export_onnx

    stages = Stages()
    export_onnx(folder, out, target="tensorrt", dtype="fp16", verify=False, progress=stages)  # type: ignore[arg-type]
    stages.seconds["in all"], stages.cpu_seconds["in all"] = time.perf_counter() - begin, time.process_time()
    found = {"seconds": stages.seconds, "cpu_seconds": stages.cpu_seconds, "peak": machine.peak_rss_bytes()}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--d-model", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the bundle")
    parser.add_argument("--export", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(*options.export)
        return
    about = machine.describe(("torch", "onnx", "onnxscript"))
    work = Path(tempfile.mkdtemp(prefix="export-memory-", dir=options.folder))
    try:
        size = make_checkpoint(work / "checkpoint", options.d_model, options.layers)
        command = [sys.executable, __file__, "--export", str(work / "checkpoint"), str(work / "bundle")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        report(about, options, size, json.loads(done.stdout.splitlines()[-1]))
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


def report(about: str, options: argparse.Namespace, size: int, result: dict[str, object]) -> None:
    """The findings, as Markdown."""
    seconds, cpu, peak = result["seconds"], result["cpu_seconds"], result["peak"]
    assert isinstance(seconds, dict) and isinstance(cpu, dict) and isinstance(peak, int)
    tracing, tracing_cpu = (sum(v for k, v in s.items() if k.startswith("trace")) for s in (seconds, cpu))
    print(about)
    print(f"\nMamba-1 {options.d_model} × {options.layers}, float16, target tensorrt, --no-verify\n")
    print("| | |\n|---|---|")
    print(f"| checkpoint | {size / 1e9:.2f} GB |")
    print(f"| peak resident memory | {peak / 1e9:.2f} GB = {peak / size:.2f} × the checkpoint |")
    print(f"| tracing, both graphs | {tracing:.0f} s ({tracing_cpu:.0f} s of processor time) |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} s ({cpu[name]:.1f} s of processor time) |")


if __name__ == "__main__":
    main()
