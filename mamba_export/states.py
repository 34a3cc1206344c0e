"""The state table: names, shapes and dtypes of the recurrent states. This is the only copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mamba_export.spec import ModelSpec

Layout = Literal["PN", "NP"]


@dataclass(frozen=True)
class State:
    """One recurrent state of one layer.

    ``shape`` leaves out the batch, which is the first dimension. ``axes`` names the dimensions, batch first.
    """

    name: str
    layer: int
    kind: Literal["conv", "ssm"]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str

    @property
    def present(self) -> str:
        """Name of the graph output that holds the state after the last token."""
        return f"present_{self.name}"


def state_table(spec: ModelSpec, dtype: str, layout: Layout = "PN") -> list[State]:
    """All states in graph order: conv_state_0, ssm_state_0, conv_state_1, …

    Args:
        spec: the model.
        dtype: ``fp32``, ``fp16`` or ``bf16``: the type of activations, and so of the conv state.
        layout: of the Mamba-2 SSM state: ``PN`` [batch, nheads, headdim, d_state], or ``NP`` with the last two
            swapped, which ONNX Runtime's LinearAttention keeps. Mamba-1 states have one layout.
    """
    table = []
    for i in range(spec.n_layer):
        conv_shape = (spec.conv_dim, spec.d_conv - 1)
        table.append(State(f"conv_state_{i}", i, "conv", conv_shape, ("batch", "channels", "d_conv-1"), dtype))
        if spec.family == "mamba1":
            shape: tuple[int, ...] = (spec.d_inner, spec.d_state)
            axes: tuple[str, ...] = ("batch", "d_inner", "d_state")
        elif layout == "PN":
            shape, axes = (spec.nheads, spec.headdim, spec.d_state), ("batch", "nheads", "headdim", "d_state")
        else:
            shape, axes = (spec.nheads, spec.d_state, spec.headdim), ("batch", "nheads", "d_state", "headdim")
        table.append(State(f"ssm_state_{i}", i, "ssm", shape, axes, "fp32"))
    return table
