"""A bare state dict: no config, so every dimension is read off the shapes.

Mamba-1 is determined by its shapes. Mamba-2 is too, but for the product ``ngroups * d_state``, of which only the
product can be seen. What shapes cannot tell is assumed, and said.
"""

from __future__ import annotations

import re
from typing import Any

from mamba_export.checkpoint.config import make_spec
from mamba_export.checkpoint.layout import EMBEDDING, HEAD, same_values
from mamba_export.checkpoint.storage import LazyTensor
from mamba_export.errors import CheckpointError, UnsupportedError
from mamba_export.spec import ModelSpec

_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.")
_FIRST = "backbone.layers.0."
_KEPT = "put the model's config.json beside the file if that is wrong"


def spec_from_shapes(tensors: dict[str, LazyTensor], where: str, assumptions: list[str]) -> ModelSpec:
    """The model whose tensors these are.

    Args:
        tensors: under canonical names.
        where: the file, for messages.
        assumptions: gains a sentence for each thing that shapes cannot tell.

    Raises:
        CheckpointError: the tensors are not those of a Mamba language model, or contradict each other.
    """
    shapes = _Shapes(tensors, where)
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors", "give the file of a trained model")
    if not any(_LAYER.match(name) for name in tensors):
        example = next(iter(tensors))
        raise UnsupportedError(
            f"{where} does not hold a Mamba language model (its first tensor is '{tensors[example].source_name}')",
            "supported: state dicts with the names of mamba_ssm or transformers",
        )
    layers = {int(match[1]) for match in map(_LAYER.match, tensors) if match}
    vocab, d_model = shapes.of(EMBEDDING if EMBEDDING in tensors else HEAD, 2)
    has = tensors.__contains__
    fields: dict[str, Any] = {
        "d_model": d_model,
        "n_layer": max(layers) + 1,
        "vocab_size": vocab,
        "padded_vocab_size": vocab,
        "d_inner": shapes.of(_FIRST + "mixer.out_proj.weight", 2)[1],
        "d_conv": shapes.of(_FIRST + "mixer.conv1d.weight", 3)[2],
        "norm": "layer" if has(_FIRST + "norm.bias") else "rms",
        "proj_bias": has(_FIRST + "mixer.in_proj.bias"),
        "conv_bias": has(_FIRST + "mixer.conv1d.bias"),
        "tie_embeddings": not has(HEAD) or not has(EMBEDDING) or same_values(tensors[HEAD], tensors[EMBEDDING]),
        "d_intermediate": shapes.of(_FIRST + "mlp.fc2.weight", 2)[1] if has(_FIRST + "mlp.fc2.weight") else 0,
    }
    if not has(HEAD):
        assumptions.append("the head is tied to the embedding, for the file has no lm_head.weight")
    assumptions.append(f"norm epsilon 1e-5, residuals in float32 ({_KEPT})")
    if has(_FIRST + "mixer.x_proj.weight"):
        fields.update(_mamba1(shapes, fields["d_inner"], assumptions))
    elif has(_FIRST + "mixer.dt_bias"):
        fields.update(_mamba2(shapes, fields["d_inner"], has(_FIRST + "mixer.norm.weight"), assumptions))
    else:
        raise UnsupportedError(
            f"{where}: layer 0 is neither a Mamba-1 mixer (no x_proj) nor a Mamba-2 mixer (no dt_bias)",
            "supported: Mamba-1, Mamba-2",
        )
    return make_spec(where, **fields)


class _Shapes:
    def __init__(self, tensors: dict[str, LazyTensor], where: str) -> None:
        self.tensors = tensors
        self.where = where

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor '{name}' is missing from {self.where}", "the file is incomplete")
        if len(tensor.shape) != rank:
            raise CheckpointError(
                f"tensor '{tensor.source_name}' in {self.where} has shape {list(tensor.shape)}, "
                f"expected {rank} dimension{'s' if rank > 1 else ''}"
            )
        return tensor.shape


def _mamba1(shapes: _Shapes, d_inner: int, assumptions: list[str]) -> dict[str, Any]:
    assumptions.append(f"no norm on B, C and dt, which Falcon-Mamba has ({_KEPT})")
    return {
        "family": "mamba1",
        "d_ssm": d_inner,
        "d_state": shapes.of(_FIRST + "mixer.A_log", 2)[1],
        "dt_rank": shapes.of(_FIRST + "mixer.dt_proj.weight", 2)[1],
    }


def _mamba2(shapes: _Shapes, d_inner: int, gated_norm: bool, assumptions: list[str]) -> dict[str, Any]:
    nheads = shapes.of(_FIRST + "mixer.A_log", 1)[0]
    conv_dim = shapes.of(_FIRST + "mixer.conv1d.weight", 3)[0]
    rows = shapes.of(_FIRST + "mixer.in_proj.weight", 2)[0]
    twice = rows - 2 * d_inner - nheads
    d_ssm = conv_dim - twice
    if nheads < 1 or twice < 2 or twice % 2 or d_ssm < 1 or d_ssm % nheads:
        raise CheckpointError(
            f"{shapes.where}: the shapes of layer 0 contradict each other: in_proj has {rows} rows, conv1d {conv_dim} "
            f"channels, out_proj {d_inner} columns, A_log {nheads} heads"
        )
    d_state = twice // 2
    assumptions.append(f"ngroups 1 with d_state {d_state}: shapes only tell their product ({_KEPT})")
    assumptions.append(f"no norm before the gate, no dt limit, chunk size 256 ({_KEPT})")
    return {
        "family": "mamba2",
        "d_ssm": d_ssm,
        "d_state": d_state,
        "nheads": nheads,
        "headdim": d_ssm // nheads,
        "gated_norm": gated_norm,
        "gated_norm_group_size": d_ssm,
        "D_has_hdim": shapes.of(_FIRST + "mixer.D", 1)[0] != nheads,
    }
