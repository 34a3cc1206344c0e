"""The peer's whole model, ``mamba_ssm.MambaLMHeadModel``, from its source packages and the two extensions built forward
only: what speed of whole models is compared with."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import torch

from .harness import Context, peer_source


def load(ctx: Context) -> Any:
    """The class ``MambaLMHeadModel``. Its package's ``__init__`` is skipped: it imports what is not used here."""
    sys.modules.setdefault("selective_scan_cuda", ctx.peer("selective_scan"))
    sys.modules.setdefault("causal_conv1d_cuda", ctx.peer("causal_conv1d"))
    conv = str(peer_source(ctx.sources, "causal_conv1d"))
    if conv not in sys.path:
        sys.path.insert(0, conv)
    root = peer_source(ctx.sources, "mamba_ssm") / "mamba_ssm"
    package = sys.modules.setdefault("mamba_ssm", type(sys)("mamba_ssm"))
    package.__path__ = [str(root)]
    for name in ("mamba_ssm.ops", "mamba_ssm.ops.triton"):  # other benchmarks of this process may have put stubs here
        if name in sys.modules and getattr(sys.modules[name], "__file__", None) is None:
            sys.modules[name].__path__ = [str(root / name.partition(".")[2].replace(".", "/"))]
    return importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel


def make(ctx: Context, d_model: int, n_layer: int, dtype: Any, layer: str = "Mamba1", vocab_size: int = 50280) -> Any:
    """A model with the peer's own random weights, on the GPU, as its published checkpoints are configured."""
    model = load(ctx)
    config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=d_model, n_layer=n_layer, vocab_size=vocab_size, ssm_cfg={"layer": layer}, pad_vocab_size_multiple=8
    )
    torch.manual_seed(0)
    return model(config, device="cuda", dtype=dtype).eval()


def generate_ms(model: Any, prompt: int = 16, tokens: int = 256, repeats: int = 5) -> float:
    """Milliseconds a token of the peer's greedy ``generate`` with its CUDA graph: the best of several runs.

    Two lengths are subtracted, so that the prompt and the capture do not count.
    """
    ids = torch.randint(0, 1000, (1, prompt), device="cuda")

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_length=prompt + count, cg=True, top_k=1)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    longest = prompt + tokens + 64
    model.generate(ids, max_length=longest, cg=True, top_k=1)  # captures for the longest
    run(tokens)
    return min((run(64 + tokens) - run(64)) / tokens * 1e3 for _ in range(repeats))


def forward_graph_ms(model: Any, tokens: int, repeats: int = 20) -> float:
    """The same pass recorded as a CUDA graph: what its kernels take without Python between them."""
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream, times = torch.cuda.Stream(), []
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            model(ids, num_last_tokens=1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            model(ids, num_last_tokens=1)
        for _ in range(repeats):
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return float(min(times))


def forward_ms(model: Any, tokens: int, repeats: int = 20) -> float:
    """Milliseconds of the peer's forward pass over one row, logits of the last token: the best of several runs."""
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids, num_last_tokens=1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times[3:]) * 1e3
