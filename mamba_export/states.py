"""The state table: names, shapes and dtypes of the recurrent states. This is the only copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mamba_export.spec import ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout = Literal["PN", "NP"]
StateType = Literal["fp32", "fp16", "int8"]
"""Of the SSM state at the graphs' edges; inside it is float32 in any case."""
INT8_MAX = 127
LEAST_SCALE = 1e-20
"""Of an int8 state that is zero."""


@dataclass(frozen=True)
class State:
    """One recurrent state of one layer.

    ``shape`` leaves out the batch, which is the first dimension. ``axes`` names the dimensions, batch first. An int8
    SSM state is followed by its ``scale``: the state's values are ``int8 * scale``, one scale a channel.
    """

    name: str
    layer: int
    kind: Literal["conv", "ssm", "scale"]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str

    @property
    def present(self) -> str:
        """Name of the graph output that holds the state after the last token."""
        return f"present_{self.name}"


def state_table(spec: ModelSpec, dtype: str, layout: Layout = "PN", ssm: StateType = "fp32") -> list[State]:
    """All states in graph order: conv_state_0, ssm_state_0 (and ssm_scale_0 if that is int8), conv_state_1, …

    Args:
        spec: the model.
        dtype: ``fp32``, ``fp16`` or ``bf16``: the type of activations, and so of the conv state.
        layout: of the Mamba-2 SSM state: ``PN`` [batch, nheads, headdim, d_state], or ``NP`` with the last two
            swapped, which ONNX Runtime's LinearAttention keeps. Mamba-1 states have one layout.
        ssm: type of the SSM state.
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
        table.append(State(f"ssm_state_{i}", i, "ssm", shape, axes, ssm))
        if ssm == "int8":
            channels = (spec.d_inner,) if spec.family == "mamba1" else (spec.nheads, spec.headdim)
            axes = ("batch", "d_inner") if spec.family == "mamba1" else ("batch", "nheads", "headdim")
            table.append(State(f"ssm_scale_{i}", i, "scale", channels, axes, "fp32"))
    return table


def _d_state_axis(state: State) -> int:
    return state.axes.index("d_state")


def to_float(arrays: Mapping[str, NDArray[Any]], states: Sequence[State]) -> dict[str, NDArray[Any]]:
    """States as a graph holds them → the same without scales: an int8 SSM state becomes float32."""
    import numpy as np

    found = {s.name: arrays[s.name] for s in states if s.kind != "scale"}
    for s in states:
        if s.dtype == "int8":
            scale = arrays[s.name.replace("ssm_state", "ssm_scale")]
            found[s.name] = found[s.name].astype(np.float32) * np.expand_dims(scale, _d_state_axis(s))
    return found


def from_float(arrays: Mapping[str, NDArray[Any]], states: Sequence[State]) -> dict[str, NDArray[Any]]:
    """The inverse of :func:`to_float`, rounding as the graphs do; a float SSM state takes the type of its row."""
    import numpy as np

    found = dict(arrays)
    for s in states:
        if s.kind != "ssm" or found[s.name].dtype == np.int8:
            continue
        if s.dtype != "int8":
            found[s.name] = found[s.name].astype(np.float16 if s.dtype == "fp16" else np.float32, copy=False)
            continue
        value, axis = found[s.name].astype(np.float32), _d_state_axis(s)
        scale = np.maximum(np.abs(value).max(axis, keepdims=True), LEAST_SCALE * INT8_MAX) / np.float32(INT8_MAX)
        found[s.name] = np.clip(np.rint(value / scale), -128, 127).astype(np.int8)
        found[s.name.replace("ssm_state", "ssm_scale")] = scale.squeeze(axis)
    return {s.name: found[s.name] for s in states}
