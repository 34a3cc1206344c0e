"""A plain Transformer of the same size, for comparisons: a GPT with rotary positions over a key-value cache.

It goes through the exporter's own machinery (tracer, passes, lowering), so that a comparison with a
Mamba is one of models, not of exporters. Its attention is ONNX Runtime's GroupQueryAttention, whose cache is one buffer
of fixed length that a call reads and extends in place: the fastest form ONNX Runtime has, and the one without copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mamba_export.ops.rms_norm import add_rms_norm

GRAPH, WEIGHTS = "model.onnx", "weights.bin"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. 768 × 12 has 124 M parameters, a Mamba-1 of 768 × 24 has 129 M.

    Attributes:
        d_model: width.
        n_layer: blocks of attention and MLP.
        n_head: heads; keys and values have as many.
        vocab_size: the embedding is tied to the head.
        positions: the longest context.
    """

    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    vocab_size: int = 50280
    positions: int = 32768 + 64

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of one token, in float32."""
        return 2 * self.n_layer * self.d_model * 4


@torch.library.custom_op("mamba_benchmarks::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    last: Tensor,
    total: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new tokens over a cache that they join.

    Args:
        q, k, v: [B, L, H * D] of the new tokens.
        past_k, past_v: [B, H, S, D], filled up to the new tokens.
        last: int32 [B], position of the last new token.
        total: int32 scalar, tokens after the call.
        cos, sin: [positions, D / 2].
    """
    batch, heads, _, width = past_k.shape
    start = int(total) - q.shape[1]
    q, k, v = (x.unflatten(2, (heads, width)).transpose(1, 2) for x in (q, k, v))
    q, k = (_rotate(x, cos[start : int(total)], sin[start : int(total)]) for x in (q, k))
    new_k, new_v = past_k.clone(), past_v.clone()
    new_k[:, :, start : int(total)], new_v[:, :, start : int(total)] = k, v
    scores = q @ new_k[:, :, : int(total)].transpose(2, 3) / math.sqrt(width)
    future = torch.arange(int(total)) > torch.arange(start, int(total))[:, None]
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ new_v[:, :, : int(total)]
    return out.transpose(1, 2).reshape(batch, -1, heads * width), new_k, new_v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(past_k), torch.empty_like(past_v)


_ATTRIBUTES = ("num_heads", "kv_num_heads", "do_rotary")


def _schema() -> onnx.defs.OpSchema:
    op = onnx.defs.OpSchema
    names = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin")
    kinds = ["T"] * 5 + ["M"] * 2 + ["T"] * 2
    return op(
        "GroupQueryAttention",
        "com.microsoft",
        1,
        inputs=[op.FormalParameter(name, kind) for name, kind in zip(names, kinds, strict=True)],
        outputs=[op.FormalParameter(name, "T") for name in ("output", "present_key", "present_value")],
        type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[
            op.Attribute(name, onnx.helper.make_attribute(name, 0))
            for name in ("num_heads", "kv_num_heads", "do_rotary")
        ],
    )


_SCHEMA = _schema()


def _translate(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, last: Any, total: Any, cos: Any, sin: Any) -> Any:
    emit = onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), "GroupQueryAttention", _SCHEMA)
    heads = int(past_k.shape[1])
    return emit(q, k, v, past_k, past_v, last, total, cos, sin, num_heads=heads, kv_num_heads=heads, do_rotary=1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.norm1, self.norm2 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)


class Transformer(nn.Module):
    """The model; ``forward`` gives the logits of the last token and the caches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        half = shape.d_model // shape.n_head // 2
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.cos, self.sin = (nn.Parameter(torch.empty(shape.positions, half)) for _ in range(2))
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.Parameter(torch.empty(shape.d_model))

    def forward(self, input_ids: Tensor, caches: list[Tensor], last: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        x, residual, presents = self.embedding(input_ids), None, []
        for i, layer in enumerate(self.layers):
            x, residual = self._norm(x, layer.norm1, residual)
            pair = caches[2 * i], caches[2 * i + 1]
            x, *present = cached_attention(layer.q(x), layer.k(x), layer.v(x), *pair, last, total, self.cos, self.sin)
            presents += present
            x, residual = add_rms_norm(layer.out(x), layer.norm2, residual, 1e-5)
            x = layer.down(F.gelu(layer.up(x)))
        x, residual = x.select(1, -1).unsqueeze(1), residual.select(1, -1).unsqueeze(1)
        x, _ = add_rms_norm(x, self.norm, residual, 1e-5)
        return (F.linear(x, self.embedding.weight), *presents)

    @staticmethod
    def _norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, weight, residual, 1e-5)


def weight_of(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of a parameter: random, except for norms and rotations."""
    if name in ("cos", "sin"):
        angle = torch.arange(shape[0])[:, None] / 10000 ** (torch.arange(shape[1]) / shape[1])
        return angle.cos() if name == "cos" else angle.sin()
    if len(shape) == 1:
        return torch.ones(shape)
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weights(shape: Shape) -> dict[str, Tensor]:
    """All parameters of the model, by name."""
    with torch.device("meta"):
        model = Transformer(shape)
    return {name: weight_of(name, tuple(p.shape), i) for i, (name, p) in enumerate(model.named_parameters())}


def export(folder: Path, shape: Shape = Shape()) -> Path:
    """Write the graph and its weights; one graph serves prefill and step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mamba_export.graph import trace as tracer
    from mamba_export.graph.external import place_weights, save_graph
    from mamba_export.graph.lower import LowerOpsPass
    from mamba_export.graph.passes import FoldConstantsPass, FuseLinearPass, SplitSequencesPass, StaticReshapePass
    from mamba_export.ops import OPS
    from mamba_export.targets import get_target

    with torch.device("meta"):
        model = Transformer(shape).eval().requires_grad_(False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracer._to_fake(model, fake)
    head = shape.d_model // shape.n_head
    with fake:
        ids = torch.zeros(2, 24, dtype=torch.int64)
        caches = [torch.zeros(2, shape.n_head, 40, head) for _ in range(2 * shape.n_layer)]
        last, total = torch.zeros(2, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    batch, seq, room = (torch.export.Dim(name, min=1) for name in ("batch", "seq", "room"))
    dims = ({0: batch, 1: seq}, [{0: batch, 2: room} for _ in caches], {0: batch}, {})
    names = [f"{kind}_{i}" for i in range(shape.n_layer) for kind in ("key", "value")]
    table = {op.torch_op: op.translate for op in OPS.values()}
    with tracer._quiet():
        program = torch.export.export(model, (ids, caches, last, total), dynamic_shapes=dims, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=tracer.OPSET,
            optimize=False,
            verbose=False,
            input_names=["input_ids", *names, "last", "total"],
            output_names=["logits", *(f"present_{name}" for name in names)],
            custom_translation_table={**table, torch.ops.mamba_benchmarks.cached_attention.default: _translate},
        )
    graph = exported.model
    graph.ir_version = 10
    for value in graph.graph.initializers.values():
        value.const_value = None
    ir.passes.Sequential(
        SplitSequencesPass(),
        StaticReshapePass(),
        FoldConstantsPass(),
        LowerOpsPass(get_target("ort")),
        FuseLinearPass(),
        FoldConstantsPass(),
        ir.passes.common.RemoveUnusedNodesPass(),
    )(graph)
    graph.opset_imports["com.microsoft"] = 1
    graph.opset_imports.pop("mamba", None)
    placements, weights = place_weights([graph]), make_weights(shape)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        for name, place in placements.items():
            file.write(b"\0" * (place.offset - file.tell()))
            file.write(weights[name].numpy().tobytes())
    save_graph(graph, folder / GRAPH)
    return folder


class CachedRunner:
    """The exported model in ONNX Runtime, its cache in place: inputs and outputs are the same buffers."""

    def __init__(self, folder: Path, shape: Shape, batch: int, room: int, threads: int | None = None) -> None:
        """Load the model and allocate a cache of ``room`` tokens for ``batch`` rows, filled with random values."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, ["CPUExecutionProvider"])
        self.make, self.batch = onnxruntime.OrtValue.ortvalue_from_numpy, batch
        random = np.random.default_rng(0)
        size = (batch, shape.n_head, room, shape.d_model // shape.n_head)
        self.names = [f"{kind}_{i}" for i in range(shape.n_layer) for kind in ("key", "value")]
        self.arrays = [np.empty(size, np.float32) for _ in self.names]
        for array in self.arrays:
            random.standard_normal(out=array, dtype=np.float32)
        self.caches = [self.make(array, "cpu", 0) for array in self.arrays]
        self.logits = np.zeros((batch, 1, shape.vocab_size), np.float32)
        self.logits_value = self.make(self.logits, "cpu", 0)

    def run(self, ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Run ``ids`` [batch, L] from position ``start`` on; the logits of the last."""
        binding = self.session.io_binding()
        total = start + ids.shape[1]
        last = np.full(self.batch, total - 1, np.int32)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("last", last)
        binding.bind_cpu_input("total", np.array(total, np.int32))
        binding.bind_ortvalue_output("logits", self.logits_value)
        for name, cache in zip(self.names, self.caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        self.session.run_with_iobinding(binding)
        return self.logits
