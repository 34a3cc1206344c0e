"""Whole-model decode at batch 1 against mamba-ssm's own CUDA-graph generate: ``python -m kernels.bench.decode``.

Random weights, the peer's own initialization, shared by both sides, and the same rounded to int8 (one scale a row) and
int4 (groups of 128), for which there is no peer here. Ours: greedy text in one launch of the fused kernel, and the
chain, one CUDA graph a token with the argmax inside. The peer: ``generate(cg=True)`` as it is, and its graph replayed
with an argmax alone. Times are per token, the difference of a long and a short run over that of their lengths.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from mamba_export.spec import ModelSpec

from ..decode_stack import DecodeStack
from ..packed_weights import Format, round_to
from .harness import Context, copy_bandwidth
from .peer_model import make

HERE = Path(__file__).resolve().parent
MODELS = {
    "mamba1-768x24": (768, 24, "Mamba1"),
    "mamba1-2560x64": (2560, 64, "Mamba1"),
    "mamba2-768x24": (768, 24, "Mamba2"),
    "mamba2-2560x64": (2560, 64, "Mamba2"),
}
INTEGERS = {"int8": Format(8, 0, False), "int4": Format(4, 128, False)}
VOCABULARY = 50280
SHORT, LONG = 32, 160
TACTICS: tuple[Literal["fused", "chain"], ...] = ("fused", "chain")


def spec_of(d_model: int, n_layer: int, family: str) -> ModelSpec:
    d_inner = 2 * d_model
    fields: dict[str, Any] = {"dt_rank": -(-d_model // 16), "d_state": 16}
    if family == "Mamba2":
        fields = {"d_state": 128, "nheads": d_inner // 64, "headdim": 64, "gated_norm_group_size": d_inner}
    return ModelSpec(
        family="mamba1" if family == "Mamba1" else "mamba2",
        d_model=d_model,
        n_layer=n_layer,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        d_inner=d_inner,
        d_ssm=d_inner,
        **fields,
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The peer's parameters under our names."""
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        w = parameter.detach()
        if name.endswith("A_log"):
            name, w = name.removesuffix("_log"), -torch.exp(w.float())
        elif name.endswith((".D", ".dt_bias", "dt_proj.bias")):
            w = w.float()
        elif name.endswith("conv1d.weight"):
            w = w.flatten(1)
        weights[name] = w.contiguous()
    return weights


def rounded(weights: dict[str, torch.Tensor], form: Format) -> dict[str, Any]:
    """The weights with in_proj, out_proj and the head as integers."""
    found: dict[str, Any] = {"lm_head.weight": weights["backbone.embedding.weight"]} | weights
    for name, weight in found.items():
        if name.endswith(("in_proj.weight", "out_proj.weight", "lm_head.weight")):
            found[name] = round_to(weight, form)
    return found


def bytes_of(stack: DecodeStack) -> int:
    """What a token must move: every weight once, one row of the embedding, the states in and out."""
    tensors = [t for layer in stack._layers for t in layer.values()] + [stack.norm_f, stack.lm_head]
    states = [*stack.conv_states, *stack.ssm_states]
    return sum(t.nbytes for t in tensors) + 2 * sum(s.nbytes for s in states)


def per_token(run: Callable[[int], None], repeats: int = 5) -> float:
    """Milliseconds of a token from the wall time of runs of two lengths; ``run(n)`` makes n tokens and waits."""
    run(SHORT)
    times: dict[int, list[float]] = {SHORT: [], LONG: []}
    for _ in range(repeats):
        for n, found in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(n)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
    return (statistics.median(times[LONG]) - statistics.median(times[SHORT])) / (LONG - SHORT) * 1e3


def time_fused(stack: DecodeStack) -> float:
    output = torch.empty(LONG, dtype=torch.int64, device="cuda")
    return per_token(lambda n: void(stack.generate([1], n, output)))


def time_steps(stack: DecodeStack, tactic: Any) -> float:
    """One CUDA graph a token, its argmax the next input."""
    ids = torch.ones(1, dtype=torch.int64, device="cuda")
    logits = torch.empty(1, stack.spec.vocab_size, device="cuda")
    stack.step(ids, logits, tactic)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack.step(ids, logits, tactic)
        torch.argmax(logits[0], dim=0, out=ids[0])

    def run(n: int) -> None:
        for _ in range(n):
            graph.replay()

    return per_token(run)


def time_generate(model: Any) -> float:
    prompt = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    return per_token(lambda n: void(model.generate(prompt, 1 + n, cg=True)), repeats=3)


@torch.inference_mode()
def time_graph(model: Any) -> float:
    generation = importlib.import_module("mamba_ssm.utils.generation")
    run_graph = generation.update_graph_cache(model, None, 1, 1, LONG + 8).run
    ids = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    position = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def run(n: int) -> None:
        nonlocal ids
        for i in range(n):
            ids = run_graph(ids, position, 1 + i)[:, -1].argmax(-1, keepdim=True)

    return per_token(run)


def void(_: Any) -> None:
    return None


@torch.inference_mode()
def peer_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after the tokens, step by step through the peer's own step functions."""
    generation = importlib.import_module("mamba_ssm.utils.generation")
    params = generation.InferenceParams(max_seqlen=64, max_batch_size=1)
    params.key_value_memory_dict = model.allocate_inference_cache(1, 64, dtype=torch.bfloat16)
    params.seqlen_offset = 1
    out = None
    for token in tokens:
        ids = torch.tensor([[token]], device="cuda")
        out = model(ids, position_ids=None, inference_params=params, num_last_tokens=1).logits[0, 0]
    assert out is not None
    logits: torch.Tensor = out.float()
    return logits


def measure_integers(
    ctx: Context, name: str, weights: dict[str, torch.Tensor], kind: str, plain: tuple[float, float]
) -> str:
    """A row for integer weights: factors against those of bfloat16, logits of the fused kernel against the chain's."""
    stack = DecodeStack(spec_of(*MODELS[name]), rounded(weights, INTEGERS[kind]))
    ids = torch.tensor([17], device="cuda")
    logits: list[torch.Tensor] = []
    for tactic in TACTICS:
        stack.reset()
        logits.append(stack.step(ids, tactic=tactic)[0])
    apart = float((logits[0] - logits[1]).norm() / logits[1].norm())
    floor = bytes_of(stack) / ctx.copy_bandwidth * 1e3
    fused, fused_graph, chain = time_fused(stack), time_steps(stack, "fused"), time_steps(stack, "chain")
    del stack
    gc.collect()
    torch.cuda.empty_cache()
    return (
        f"| {name}, {kind} | {fused:.4f} | {fused_graph:.4f} | {chain:.4f} | | | {floor:.4f} "
        f"| {plain[0] / fused:.2f} | {plain[0] / fused_graph:.2f} | {plain[1] / chain:.2f} | {floor / fused:.0%} "
        f"| fused against chain {apart:.1e} |"
    )


def measure(ctx: Context, name: str, generate: bool) -> str:
    d_model, n_layer, family = MODELS[name]
    model = make(ctx, d_model, n_layer, torch.bfloat16, family, VOCABULARY)
    stack = DecodeStack(spec_of(d_model, n_layer, family), weights_of(model))
    tokens = [1, 17, 4711, 50000]
    theirs = peer_logits(model, tokens)
    errors = {}
    for tactic in TACTICS:
        stack.reset()
        for token in tokens:
            ours = stack.step(torch.tensor([token], device="cuda"), tactic=tactic)[0]
        errors[tactic] = float((ours - theirs).norm() / theirs.norm())
    floor = bytes_of(stack) / ctx.copy_bandwidth * 1e3
    print(name, errors, f"floor {floor:.4f}", flush=True)
    fused, fused_graph, chain = time_fused(stack), time_steps(stack, "fused"), time_steps(stack, "chain")
    print(f"fused {fused:.4f}, a graph a token {fused_graph:.4f}, chain {chain:.4f}", flush=True)
    graph = time_graph(model)
    peer = time_generate(model) if generate else graph
    del stack
    integers = [measure_integers(ctx, name, weights_of(model), kind, (fused, chain)) for kind in INTEGERS]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return "\n".join([
        f"| {name} | {fused:.4f} | {fused_graph:.4f} | {chain:.4f} | {peer:.4f} | {graph:.4f} | {floor:.4f} "
        f"| {peer / fused:.2f} | {peer / fused_graph:.2f} | {peer / chain:.2f} | {floor / fused:.0%} "
        f"| {errors['fused']:.1e}, {errors['chain']:.1e} |",
        *integers,
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--sources", type=Path, default=Path("build/peer"))
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS-decode.md")
    arguments = parser.parse_args()
    arguments.sources.mkdir(parents=True, exist_ok=True)
    ctx = Context(arguments.sources, copy_bandwidth=copy_bandwidth())
    properties = torch.cuda.get_device_properties(0)
    lines = [
        "# Whole-model decode: the last output of `python -m kernels.bench.decode`\n",
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}; copy bandwidth {ctx.copy_bandwidth / 1e12:.2f} TB/s (reads and writes). Batch 1, "
        "bfloat16, random weights, greedy, milliseconds a token. Fused: one launch for all tokens, or one CUDA graph a "
        "token; chain: one CUDA graph a token. The peer: mamba-ssm 2.3.2.post1, its `generate(cg=True)` and its graph "
        "alone, in the same run. In rows of int8 (one scale a row) and int4 (groups of 128) in_proj, out_proj and the "
        "head are rounded to nearest, and factors are against bfloat16. The floor is the bytes that a token must move "
        "over the copy bandwidth.\n",
        "| model | fused | fused, a graph a token | chain | peer | peer's graph | floor | fused × | fused graph × "
        "| chain × | of the floor | logits against the peer's: fused, chain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in arguments.models:
        lines.append(measure(ctx, name, MODELS[name][2] == "Mamba1"))
        print(lines[-1], flush=True)
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
