"""decode_stack: one token through the whole model; what is left of a step graph that ``--fuse-step`` fuses.

Inputs: input_ids [B, 1]; then, variadic, the states in the order of the state table, the embedding, the last norm, the
head, and of every layer the parameters that :data:`mamba_export.fused_step.PARAMETERS` lists. Outputs: logits
[B, 1, vocab], then the present states.
With ``weight_bits`` in_proj, out_proj and the head are int32 [rows, words of a row]: the rows of decode_stack.h, packed
by kernels/packed_weights.py, whose scales have the type of the other parameters, float16 or bfloat16. Where it is 4, a
matrix whose rows are as long as those of int8 is int8. With ``packed_embedding`` the embedding is rows of the head's
kind.
Unlike the other ops it is not traced: :class:`mamba_export.graph.fuse.FuseStepPass` makes it from a step graph, whose
nodes become its function body. The kernels behind it are decode_stack of kernels/cuda; their adapters read the inputs
in this order too (kernels/cuda/include/mamba/decode_stack_operands.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_export.errors import UsageError
from mamba_export.fused_step import OP_TYPE, unsupported
from mamba_export.ops.causal_conv1d import causal_conv1d_reference
from mamba_export.ops.opdef import DOMAIN, VERSION
from mamba_export.ops.rms_norm import add_rms_norm_reference, normalize
from mamba_export.ops.selective_scan import selective_scan_reference
from mamba_export.ops.ssd_scan import ssd_scan_reference
from mamba_export.spec import ModelSpec

if TYPE_CHECKING:
    from mamba_export.kernels.packed_weights import Format

ATTRIBUTES = {
    "family": (1, "1: Mamba-1, 2: Mamba-2"),
    "n_layer": (1, "layers"),
    "dt_rank": (0, "Mamba-1: width of the input of dt_proj"),
    "nheads": (0, "Mamba-2: heads"),
    "ngroups": (1, "groups that share one B and one C"),
    "vocab_size": (1, "columns of the logits; the head may have more rows"),
    "residual_in_fp32": (1, "1: the residual is float32, 0: it has the dtype of the weights"),
    "norm_eps": (1e-5, "epsilon of the norms before the mixers and of the last"),
    "gated_norm_eps": (1e-5, "Mamba-2: epsilon of the gated norm"),
    "weight_bits": (0, "8 or 4: in_proj, out_proj and the head are packed rows of such integers; 0: they are matrices"),
    "group_size": (0, "values of a packed row that share a scale; 0: the whole row"),
    "packed_embedding": (0, "1: the embedding is packed rows too, of the head's integers"),
}


def _schema() -> onnx.defs.OpSchema:
    op = onnx.defs.OpSchema
    variadic = op.FormalParameterOption.Variadic
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    make = onnx.helper.make_attribute
    return op(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc=__doc__,
        inputs=[
            op.FormalParameter("input_ids", "tensor(int64)"),
            op.FormalParameter("tensors", "T", param_option=variadic, is_homogeneous=False, min_arity=1),
        ],
        outputs=[
            op.FormalParameter("logits", "tensor(float)"),
            op.FormalParameter("presents", "T", param_option=variadic, is_homogeneous=False, min_arity=1),
        ],
        type_constraints=[("T", [*floats, "tensor(int32)"], "states and parameters; int32: packed rows")],
        attributes=[op.Attribute(key, make(key, default), text) for key, (default, text) in ATTRIBUTES.items()],
    )


SCHEMA = _schema()


def attributes_of_spec(
    spec: ModelSpec, form: Format | None = None, packed_embedding: bool = False
) -> dict[str, int | float]:
    """The node's attributes; ``form`` is that of the packed rows.

    Raises:
        UsageError: when the op does not cover the model.
    """
    reason = unsupported(spec)
    if reason is not None:
        raise UsageError(f"--fuse-step does not cover models with {reason}", "export without --fuse-step")
    return {
        "family": 1 if spec.family == "mamba1" else 2,
        "n_layer": spec.n_layer,
        "dt_rank": spec.dt_rank,
        "nheads": spec.nheads,
        "ngroups": spec.ngroups,
        "vocab_size": spec.vocab_size,
        "residual_in_fp32": int(spec.residual_in_fp32),
        "norm_eps": spec.norm_eps,
        "gated_norm_eps": spec.gated_norm_eps,
        "weight_bits": 0 if form is None else form.bits,
        "group_size": 0 if form is None else form.group,
        "packed_embedding": int(packed_embedding),
    }


def decode_stack_reference(
    input_ids: Tensor, states: Sequence[Tensor], parameters: Sequence[Tensor], attributes: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The definition, from the definitions of the ops it replaces.

    Args:
        input_ids: int64 [B, 1].
        states: conv and ssm state of every layer, in the order of the state table.
        parameters: in the order of the op's inputs; packed rows are int32 [rows, words of a row].
        attributes: the node's.

    Returns:
        The logits [B, 1, vocab] and the present states.
    """
    embedding, norm_f, head, *rest = parameters
    mamba1, layers = attributes["family"] == 1, attributes["n_layer"]
    each = len(rest) // layers
    dtype, x = norm_f.dtype, embedding[input_ids]
    if attributes.get("packed_embedding", 0):
        x = _matrix(x.flatten(0, 1), norm_f, attributes).unflatten(0, input_ids.shape)
    head = _matrix(head, norm_f, attributes)
    wide = torch.promote_types(dtype, torch.float32)
    residual: Tensor | None = None
    presents: list[Tensor] = []
    for i in range(layers):
        norm, in_proj, conv_weight, conv_bias, *others = rest[i * each : (i + 1) * each]
        source = x.to(wide) if residual is None and attributes["residual_in_fp32"] else x
        x, residual = add_rms_norm_reference(source, norm, residual, attributes["norm_eps"])
        mixer = _mamba1 if mamba1 else _mamba2
        projected = F.linear(x.to(dtype), _matrix(in_proj, x.to(dtype), attributes))
        x, *present = mixer(projected, conv_weight, conv_bias, others, states[2 * i], states[2 * i + 1], attributes)
        presents += present
    x, _ = add_rms_norm_reference(x, norm_f, residual, attributes["norm_eps"])
    logits = F.linear(x, head)[..., : attributes["vocab_size"]]
    return (logits.to(wide), *presents)


def _matrix(weight: Tensor, x: Tensor, attributes: dict[str, Any]) -> Tensor:
    """The weight [out, in] that goes with ``x`` [..., in], unpacked if it is packed."""
    if not attributes.get("weight_bits", 0):
        return weight
    from mamba_export.kernels.packed_weights import Format, format_by_length, unpack

    rows, columns = weight.contiguous().view(torch.uint8), x.shape[-1]
    form = Format(attributes["weight_bits"], attributes["group_size"], False)
    matrix: Tensor = unpack(rows, format_by_length(form, columns, rows.shape[1]), columns, x.dtype)
    return matrix


def _mamba1(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    others: Sequence[Tensor],
    conv_state: Tensor,
    ssm_state: Tensor,
    attributes: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    x_proj, dt_proj, dt_bias, A, D, out_proj = others
    u, z = projected.chunk(2, dim=-1)
    u, conv_state = causal_conv1d_reference(u, conv_weight, conv_bias, conv_state)
    rank, d_state = attributes["dt_rank"], A.shape[1]
    dt, B, C = F.linear(u, x_proj).split([rank, d_state, d_state], dim=-1)
    delta = F.linear(dt, dt_proj)
    y, ssm_state = selective_scan_reference(
        u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, dt_bias, ssm_state, z, delta_softplus=True
    )
    return F.linear(y, _matrix(out_proj, y, attributes)), conv_state, ssm_state


def _mamba2(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    others: Sequence[Tensor],
    conv_state: Tensor,
    ssm_state: Tensor,
    attributes: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    dt_bias, A, D, norm, out_proj = others
    heads, groups, d_inner = attributes["nheads"], attributes["ngroups"], norm.shape[0]
    bc = (conv_weight.shape[0] - d_inner) // 2
    z, xBC, dt = projected.split([d_inner, conv_weight.shape[0], heads], dim=-1)
    xBC, conv_state = causal_conv1d_reference(xBC, conv_weight, conv_bias, conv_state)
    u, B, C = xBC.split([d_inner, bc, bc], dim=-1)
    B, C = (v.unflatten(2, (groups, -1)) for v in (B, C))
    y, ssm_state = ssd_scan_reference(u.unflatten(2, (heads, -1)), dt, A, B, C, D, dt_bias, ssm_state, dt_softplus=True)
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = y.flatten(2).to(wide) * F.silu(z.to(wide))
    y = (normalize(gated, attributes["gated_norm_eps"]) * norm.to(wide)).to(y.dtype)
    return F.linear(y, _matrix(out_proj, y, attributes)), conv_state, ssm_state
