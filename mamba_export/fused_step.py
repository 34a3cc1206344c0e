"""What a fused decode step covers and which parameters it takes: shared by the op, the graph pass and the kernel."""

from __future__ import annotations

import math

from mamba_export.quantized import EMBEDDING, HEAD
from mamba_export.spec import ModelSpec

OP_TYPE = "MambaDecodeStack"
"""The node that holds the whole step."""
_BEFORE = ("norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias")
PARAMETERS = {
    "mamba1": (
        *_BEFORE,
        *("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A", "mixer.D"),
        "mixer.out_proj.weight",
    ),
    "mamba2": (*_BEFORE, "mixer.dt_bias", "mixer.A", "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight"),
}
"""Of one layer, in the order of the op's inputs: names below ``backbone.layers.{i}.``."""
PACKABLE = ("mixer.in_proj.weight", "mixer.out_proj.weight", HEAD)
"""How the names of those end that may be packed integers instead: rows of kernels/packed_weights.py, of one format."""


def packed_name(name: str) -> str:
    """The initializer that holds a parameter's packed rows."""
    return f"{name}.packed"


def parameter_names(spec: ModelSpec, packed: bool = False, packed_embedding: bool = False) -> list[str]:
    """Names of the parameters in the order of the op's inputs; a tied tensor comes twice, as the head where packed."""
    head = EMBEDDING if spec.tie_embeddings and not packed else HEAD
    names = [HEAD if packed_embedding else EMBEDDING, "backbone.norm_f.weight", head]
    names += [f"backbone.layers.{i}.{name}" for i in range(spec.n_layer) for name in PARAMETERS[spec.family]]
    return [packed_name(name) if packed and name.endswith(PACKABLE) else name for name in names]


def unsupported(spec: ModelSpec) -> str | None:
    """What a model has that a fused step does not cover, or None."""
    mamba2 = spec.family == "mamba2"
    reasons = {
        "a LayerNorm": spec.norm != "rms",
        "biases in the projections": spec.proj_bias,
        "an MLP": spec.d_intermediate > 0 or spec.d_mlp > 0,
        "a norm on B, C and dt": spec.bcdt_norm_eps is not None,
        "several groups of B and C": not mamba2 and spec.ngroups != 1,
        "no gated norm": mamba2 and not spec.gated_norm,
        "a norm before the gate": mamba2 and spec.norm_before_gate,
        "a gated norm in groups": mamba2 and spec.gated_norm_group_size != spec.d_inner,
        "a D for every channel": mamba2 and spec.D_has_hdim,
        "limits of dt": mamba2 and spec.dt_limit != (0.0, math.inf),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
