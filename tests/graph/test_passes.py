"""Passes on small graphs written as text."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mamba_export.graph.passes import FoldReshapesPass

_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 1, 16] x) => (float[batch, 1, 16] y) {{
    there = Constant <value = int64[{n}] {{{there}}}> ()
    back = Constant <value = int64[3] {{{back}}}> ()
    wide = Reshape {mode} (x, there)
    same = Reshape (wide, back)
    y = Neg (same)
}}
"""


def reshapes(there: list[int], back: list[int], mode: str = "") -> int:
    text = _TEXT.format(n=len(there), there=", ".join(map(str, there)), back=", ".join(map(str, back)), mode=mode)
    model = ir.from_onnx_text(text)
    FoldReshapesPass()(model)
    return sum(node.op_type == "Reshape" for node in model.graph)


@pytest.mark.parametrize(("there", "back"), [([0, 0, 1, 16], [0, 0, 16]), ([0, 1, 1, 16], [0, 1, 16])])
def test_a_reshape_there_and_back_disappears(there: list[int], back: list[int]) -> None:
    assert reshapes(there, back) == 0


@pytest.mark.parametrize(
    ("there", "back"),
    [
        ([0, 0, 1, 16], [0, 16, 1]),  # another shape
        ([0, 0, 4, 4], [0, 0, -1]),  # a size to be worked out
        ([1, 0, 16], [0, 0, 16]),  # a batch of 1, which the source need not have
    ],
)
def test_other_reshapes_stay(there: list[int], back: list[int]) -> None:
    assert reshapes(there, back) == 2


def test_zeros_that_mean_zero_stay() -> None:
    assert reshapes([0, 0, 1, 16], [0, 0, 16], "<allowzero = 1>") == 2
