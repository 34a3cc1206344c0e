"""Quantized bundles in stock ONNX Runtime against llama.cpp at the same bits: one token, a prefill, size, perplexity.

    python benchmarks/quantized_decode.py [--cache FOLDER] [--rounds 4] [--windows 64] [--shared ../shared]

Speed: Mamba-1 768 × 24, vocabulary 50,280, random weights; all contenders are loaded at once and take turns, as in
cpu_decode.py. Weights are rounded to nearest there, which is all that speed depends on.
Perplexity: the trained mamba1-small under ``--shared``, calibrated on calibration.bin; the same windows of eval.bin for
all. llama.cpp gets the checkpoint through transformers' save_pretrained and its own converter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpu_decode
import machine
import numpy as np
import peers

ROOT = Path(__file__).resolve().parents[1]
# Recipe of the speed test, those of the perplexity test, and llama.cpp's file type of about as many bits.
PAIRS = {
    "8 bits": ("w8a16", ("w8a16", "w8a16-gptq"), "Q8_0"),
    "4 bits": ("w4a16-g32", ("w4a16-g32",), "Q4_K_M"),
    "4 bits, groups of 128": ("w4a16", ("w4a16",), "Q4_K_M"),
}


def rounded(recipe: str, cache: Path) -> Path:
    """The recipe without what needs calibration: where it would choose sensitive matrices for int8, the first layers
    become int8, as many as bring the average to the same number of bits."""
    from mamba_export.calibration.recipes import load_recipe

    known = load_recipe(recipe)
    lines = [f"extends: {recipe}", "weights: {method: rtn, scales: max}", "head: {method: rtn, scales: max}"]
    lines += ["tune: {steps: 0}", "promote: {bits: 0}"]
    if known.promote.bits:
        share = (known.promote.bits - 4 - 16 / known.weights.group) / 4
        count = max(0, round(share * cpu_decode.SHAPE["num_hidden_layers"]))
        lines.append("layers:" if count else "")
        lines += [f'  "backbone.layers.{i}.*": {{weights: {{type: int8}}}}' for i in range(count)]
    path = cache / "recipes" / f"{recipe}-rounded.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def quantized(ckpt: Path, recipe: Any, name: str, cache: Path, **options: Any) -> Path:
    """A bundle of target ``ort``, made anew."""
    from mamba_export.quantization import quantize

    out = cache / "bundles" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    quantize(ckpt, out, recipe=recipe, target="ort", verify=False, force=True, **options)
    return out


def gguf(source: Path, kind: str, python: str, cache: Path) -> Path:
    """The quantized GGUF of a Hugging Face folder."""
    plain = peers.gguf_of(source, cache)
    if kind == "F32":
        return plain
    out = plain.with_name(plain.name.replace("-f32", f"-{kind}"))
    if not out.exists():
        script = str(ROOT / "benchmarks" / "llama_peer.py")
        subprocess.run([python, script, "quantize", plain, out, kind], check=True, capture_output=True)
    return out


def for_llama(checkpoint: Path, cache: Path) -> Path:
    """A Mamba-1 checkpoint in state-spaces' form as a Hugging Face folder, in float32, without its tokenizer."""
    folder = cache / "models" / f"{checkpoint.name}-hf"
    if (folder / "config.json").exists():
        return folder
    import torch
    import transformers

    config = json.loads((checkpoint / "config.json").read_text())
    weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    vocab, d_model = weights["backbone.embedding.weight"].shape
    shape = {"vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": config["n_layer"], "state_size": 16}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, residual_in_fp32=True))
    named = {k.replace("backbone.embedding.", "backbone.embeddings."): v.float() for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def speed(options: argparse.Namespace, python: str) -> None:
    """The first table."""
    model = cpu_decode.make_model(options.cache)
    running: list[cpu_decode.Process] = []
    sizes: dict[str, float] = {}
    try:
        for recipe, _, kind in PAIRS.values():
            name = f"mamba-export {recipe}"
            bundle = quantized(model, rounded(recipe, options.cache), f"{model.name}-{recipe}", options.cache)
            sizes[name] = (bundle / "weights.bin").stat().st_size / 1e6
            running.append(cpu_decode.Process("mamba-export", sys.executable, bundle, options.threads))
            running[-1].name = name
            peer = f"llama.cpp {kind}"
            if peer not in sizes:
                file = gguf(model, kind, python, options.cache)
                sizes[peer] = file.stat().st_size / 1e6
                running.append(cpu_decode.Process("llama.cpp", python, file, options.threads))
                running[-1].name = peer
        best = cpu_decode.take_turns(running, options)
    finally:
        for process in running:
            process.__exit__(None, None, None)
    title = f"prefill of {options.length}, ms | one step, ms | llama.cpp / ours: prefill, step"
    print(f"\n| bits | contender | weights, MB | {title} |")
    print("|---|---|---|---|---|---|")
    for bits, (recipe, _, kind) in PAIRS.items():
        ours, theirs = best[f"mamba-export {recipe}"], best[f"llama.cpp {kind}"]
        ratio = " · ".join(f"{theirs[key] / ours[key]:.2f} ×" for key in ("prefill", "step"))
        for name, times, last in ((f"mamba-export {recipe}", ours, ratio), (f"llama.cpp {kind}", theirs, "")):
            cells = (bits, name, f"{sizes[name]:.0f}", f"{times['prefill']:.0f}", f"{times['step']:.1f}", last)
            print("| " + " | ".join(cells) + " |")


def quality(options: argparse.Namespace, python: str) -> None:
    """The second table."""
    from mamba_export import calibrate, perplexity

    checkpoint, data = options.shared / "checkpoints" / "mamba1-small", options.shared / "data"
    if not checkpoint.is_dir():
        print(f"\nno trained checkpoint at {checkpoint}: perplexity is not compared")
        return
    statistics = options.cache / "mamba1-small.calibration.safetensors"
    calibrate(checkpoint, data / "calibration.bin", statistics, force=True)
    source = for_llama(checkpoint, options.cache)

    def of_llama(kind: str) -> tuple[float, float, float]:
        file = gguf(source, kind, python, options.cache)
        script = [python, str(ROOT / "benchmarks" / "llama_peer.py"), "perplexity", file, data / "eval.bin"]
        script += ["--windows", str(options.windows), "--threads", str(options.threads)]
        done = subprocess.run(script, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        nll = json.loads(done.stdout.splitlines()[-1])["nll"]
        value = math.exp(float(np.mean(nll)))
        return value, value * float(np.std(nll, ddof=1)) / math.sqrt(len(nll)), file.stat().st_size / 1e6

    def of_bundle(bundle: Path) -> tuple[float, float, float]:
        found = perplexity(bundle, data / "eval.bin", limit=options.windows)
        return found.perplexity, found.error, (bundle / "weights.bin").stat().st_size / 1e6

    from mamba_export.export import export_onnx

    plain = options.cache / "bundles" / "mamba1-small-fp32"
    export_onnx(checkpoint, plain, target="ort", logits="all", verify=False, force=True)
    floats = {"mamba-export fp32": of_bundle(plain), "llama.cpp F32": of_llama("F32")}
    print(f"\nmamba1-small, {options.windows} windows of 1,024 tokens of eval.bin:\n")
    print("| bits | contender | MB | perplexity | increase over its own float32 |\n|---|---|---|---|---|")
    for name, (value, error, size) in floats.items():
        print(f"| 32 bits | {name} | {size:.1f} | {value:.4f} ± {error:.4f} | |")
    known: dict[str, tuple[float, float, float]] = {}
    for bits, (_, recipes, kind) in PAIRS.items():
        rows = []
        for recipe in recipes:
            bundle = quantized(
                checkpoint, recipe, f"mamba1-small-{recipe}", options.cache, calibration=statistics, logits="all"
            )
            rows.append((f"mamba-export {recipe}", of_bundle(bundle), "mamba-export fp32"))
        if kind not in known:
            known[kind] = of_llama(kind)
        rows.append((f"llama.cpp {kind}", known[kind], "llama.cpp F32"))
        for name, (value, _, size), base in rows:
            loss = 100 * (value / floats[base][0] - 1)
            print(f"| {bits} | {name} | {size:.1f} | {value:.4f} | {loss:+.3f} % |", flush=True)
    value, _, size = of_llama("Q4_0")
    loss = 100 * (value / floats["llama.cpp F32"][0] - 1)
    print(f"| 4 bits, groups of 32 | llama.cpp Q4_0 | {size:.1f} | {value:.4f} | {loss:+.3f} % |")
    print(
        "\nWidths that are no multiple of 256 have no Q4_K: llama.cpp takes types of 5 and 8 bits there, as MB shows."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("-p", "--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between turns")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", choices=("speed", "perplexity"))
    options = parser.parse_args()
    sys.path.insert(1, str(ROOT))
    python = peers.python_of("llamacpp", options.cache)
    if python is None:
        sys.exit("llama.cpp does not install here")
    print(f"{machine.describe()}, llama-cpp-python {peers.LLAMA.partition('==')[2]}; {options.threads} threads")
    if options.only != "perplexity":
        speed(options, python)
    if options.only != "speed":
        quality(options, python)


if __name__ == "__main__":
    main()
