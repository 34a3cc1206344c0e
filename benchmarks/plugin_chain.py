"""The step of a whole Mamba-1 model through the plugin library, replayed as a CUDA graph, against the peer's generate.

    python benchmarks/plugin_chain.py LIBMAMBA_PLUGINS LIBPLUGIN_CHAIN --sources PEER [--d-model 768 --n-layer 24]

What runs, in one stream and one graph, batch 1, bfloat16 with float32 states: for every layer both plugins of the step
graph (MambaCausalConv1d, MambaSelectiveStateUpdate), restored from their serialized fields, with the state read and
written in one buffer; the four projections and the output projection, either through cuBLAS as torch calls it, or
through a plain matrix-vector kernel of this harness; residual sum and RMSNorm as one kernel, as TensorRT fuses them;
the embedding and the choice of the likeliest token through torch. TensorRT's own engine is not part of it. The weights
are the peer's, and its tokens have to come out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mamba_export

if str(Path(__file__).resolve().parents[1]) not in mamba_export.__path__:
    mamba_export.__path__.append(str(Path(__file__).resolve().parents[1]))
from mamba_export.kernels.bench import harness, peer_model

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7}  # nvinfer1::DataType


class Node:
    """One plugin node with its buffers bound."""

    def __init__(self, chain: Any, library: Any, op: str, inputs: list[Tensor], outputs: list[Tensor], gate: bool):
        self._chain, self._keep = chain, [inputs, outputs]
        tensors = [*inputs, *outputs]
        types = (ctypes.c_int32 * len(tensors))(*(TYPES[t.dtype] for t in tensors))
        sizes = [size for t in tensors for size in (t.dim(), *t.shape)]
        self._node = chain.chain_node(
            library, op.encode(), int(gate), len(inputs), types, (ctypes.c_int64 * len(sizes))(*sizes)
        )
        if not self._node:
            raise RuntimeError(f"{op} was refused")
        if not all(t.is_contiguous() for t in tensors):
            raise ValueError("plugins take dense buffers")
        self._in = (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs))
        self._out = (ctypes.c_void_p * len(outputs))(*(t.data_ptr() for t in outputs))

    def enqueue(self) -> None:
        if self._chain.chain_enqueue(self._node, self._in, self._out, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("enqueue failed")


class Chain:
    """The step of the peer's model, through the plugins."""

    def __init__(self, plugins: Path, glue: Path, model: Any, cublas: bool) -> None:
        self.chain, self.cublas = ctypes.CDLL(str(glue)), cublas
        self.chain.chain_open.restype = self.chain.chain_node.restype = ctypes.c_void_p
        self.chain.chain_open.argtypes = [ctypes.c_char_p]
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self.chain.chain_node.argtypes = [pointer, ctypes.c_char_p, integer, integer, pointer, pointer]
        self.chain.chain_enqueue.argtypes = [pointer] * 4
        self.chain.chain_gemv.argtypes = [pointer] * 3 + [integer] * 2 + [pointer]
        self.chain.chain_add_norm.argtypes = [pointer] * 4 + [integer, ctypes.c_float, pointer]
        library = self.chain.chain_open(str(plugins).encode())
        backbone = model.backbone
        self.embedding, self.norm_f = backbone.embedding.weight, backbone.norm_f
        self.head = model.lm_head.weight
        width, dtype = self.embedding.shape[1], self.embedding.dtype

        def new(*shape: int, dtype: Any = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device="cuda")

        self.token = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.residual = new(1, width, dtype=torch.float32)
        self.hidden, self.normed = new(1, width), new(1, width)
        self.logits = new(1, self.head.shape[0])
        self.layers, self.states = [], []
        for block in backbone.layers:
            m = block.mixer
            inner, taps, rank, n = m.d_inner, m.d_conv, m.dt_rank, m.d_state
            xz, xdb, delta = new(1, 2 * inner), new(1, rank + 2 * n), new(1, inner)
            u, y = new(1, 1, inner), new(1, 1, inner)
            conv, ssm = new(1, inner, taps - 1), new(1, inner, n, dtype=torch.float32)
            weight = m.conv1d.weight[:, 0].contiguous()
            first = Node(
                self.chain, library, "MambaCausalConv1d",
                [xz[:, :inner].view(1, 1, inner), weight, m.conv1d.bias, conv], [u, conv], gate=False,
            )  # fmt: skip
            b, c = xdb[:, rank : rank + n].view(1, 1, 1, n), xdb[:, rank + n :].view(1, 1, 1, n)
            a = -torch.exp(m.A_log.float()).contiguous()
            second = Node(
                self.chain, library, "MambaSelectiveStateUpdate",
                [u, delta.view(1, 1, inner), a, b, c, m.D.float(), m.dt_proj.bias.float(), ssm,
                 xz[:, inner:].view(1, 1, inner)],
                [y, ssm], gate=True,
            )  # fmt: skip
            weights = (m.in_proj.weight, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight)
            self.layers.append((block.norm, first, second, weights, (xz, xdb, delta, u, y, rank)))
            self.states += [conv, ssm]

    def add_norm(self, norm: Any, add: Tensor | None) -> None:
        status = self.chain.chain_add_norm(
            self.residual.data_ptr(), add.data_ptr() if add is not None else None, norm.weight.data_ptr(),
            self.normed.data_ptr(), self.residual.shape[1], norm.eps, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        if status:
            raise RuntimeError("the norm failed")

    def project(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """One row through a projection."""
        if self.cublas:
            torch.mm(x, weight.T, out=out)
            return
        pointers = (weight.data_ptr(), x.data_ptr(), out.data_ptr())
        if self.chain.chain_gemv(*pointers, *weight.shape, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("the projection failed")

    def step(self) -> None:
        """One token: ``self.token`` in, the likeliest next one out in its place."""
        self.residual.copy_(self.embedding.index_select(0, self.token))
        add = None
        for norm, first, second, (in_proj, x_proj, dt_proj, out_proj), buffers in self.layers:
            xz, xdb, delta, u, y, rank = buffers
            self.add_norm(norm, add)
            self.project(self.normed, in_proj, xz)
            first.enqueue()
            self.project(u[0], x_proj, xdb)
            self.project(xdb[:, :rank], dt_proj, delta)
            second.enqueue()
            self.project(y[0], out_proj, self.hidden)
            add = self.hidden
        self.add_norm(self.norm_f, add)
        self.project(self.normed, self.head, self.logits)
        torch.argmax(self.logits, 1, out=self.token)

    def plugins_alone(self) -> None:
        for _, first, second, _, _ in self.layers:
            first.enqueue()
            second.enqueue()

    def reset(self, token: int = 1) -> None:
        for state in self.states:
            state.zero_()
        self.token.fill_(token)


def captured(call: Any) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 200, rounds: int = 9) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(rounds):
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / replays)
    return float(statistics.median(times))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plugins", type=Path)
    parser.add_argument("glue", type=Path)
    parser.add_argument("--sources", type=Path, required=True, help="the peer's source packages, or where to put them")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-layer", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens that are compared")
    options = parser.parse_args()
    model = peer_model.make(harness.Context(options.sources), options.d_model, options.n_layer, torch.bfloat16)
    # Teacher-forced by the peer's tokens: two implementations of bfloat16 may part at a near tie, and then differ on.
    ids = model.generate(torch.ones(1, 1, dtype=torch.int64, device="cuda"), max_length=options.tokens + 1, top_k=1)
    expected = model(ids).logits[0, :-1].float()
    found: dict[str, Any] = {"model": f"{options.d_model} x {options.n_layer}", "nodes": 2 * options.n_layer}
    for name in ("cublas", "gemv"):
        chain = Chain(options.plugins, options.glue, model, name == "cublas")
        graph = captured(chain.step)
        chain.reset()
        difference, same = 0.0, 0
        for i in range(options.tokens):
            chain.token.copy_(ids[0, i : i + 1])
            graph.replay()
            difference = max(difference, float((chain.logits[0].float() - expected[i]).norm() / expected[i].norm()))
            same += int(chain.token[0] == expected[i].argmax())
        found[name] = {"ms": replay_ms(graph), "logits_relative": difference, "same_tokens": [same, options.tokens]}
    found["plugins_alone_ms"] = replay_ms(captured(chain.plugins_alone))
    found |= {"peer_ms": peer_model.generate_ms(model), "torch": torch.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
