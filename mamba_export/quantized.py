"""A quantized model: integer matrices, scales, and what happens to the inputs of its linear layers.

Plain data between the stage that chooses the numbers (:mod:`mamba_export.calibration`) and those that use them: the
simulated torch model, and the graphs and weights of a bundle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mamba_export.states import StateType

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["int4", "int8", "fp8"]
EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"
FP8_MAX = 448.0
"""Largest value of float8 e4m3fn."""


_WIDEST_BLOCK = 128


def _block_for(columns: int) -> int:
    """The block of a contrib op for a matrix with one scale a row: divides the columns if a power of two does."""
    block = _WIDEST_BLOCK
    while block > 16 and columns % block:
        block //= 2
    return block if columns % block == 0 else min(_WIDEST_BLOCK, max(16, 1 << (columns - 1).bit_length()))


@dataclass
class Matrix:
    """A quantized [rows, columns] matrix: ``values * scales``.

    Attributes:
        kind: ``int8`` (−127 … 127), ``int4`` (−8 … 7) or ``fp8`` (e4m3fn).
        values: [rows, columns], relative to the zero points; int8 also for ``int4``, float8_e4m3fn for ``fp8``.
        scales: float32 [rows, groups]; one group covers ``group`` columns, the last one perhaps fewer.
        group: columns that share a scale; all of them when it is not smaller than their number.
        zeros: int8 [rows, groups], zero points: what is stored is ``values + zeros``; None where they are all zero.
    """

    kind: Kind
    values: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | None = None

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    @property
    def groups(self) -> int:
        return int(self.scales.shape[1])

    @property
    def block(self) -> int:
        """Columns that share a scale in ONNX Runtime's contrib ops, which know no scale for a whole row."""
        return self.group if self.group < self.columns else _block_for(self.columns)

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def bits(self) -> int:
        """What it takes there, scales and padding included."""
        width = 4 if self.kind == "int4" else 8
        return len(self.values) * self.blocks * (width * self.block + 16 + (0 if self.zeros is None else 4))

    def cpu(self) -> Matrix:
        """The same in host memory."""
        zeros = None if self.zeros is None else self.zeros.cpu()
        return Matrix(self.kind, self.values.cpu(), self.scales.cpu(), self.group, zeros)

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        scales = self.scales.repeat_interleave(self.group, 1)[:, : self.columns]
        return self.values.float() * scales.float()


@dataclass
class InputQuantization:
    """Static quantization of a linear layer's input: one scale, symmetric.

    Attributes:
        kind: ``int8`` or ``fp8``.
        scale: of the tensor after smoothing and rotation.
    """

    kind: Literal["int8", "fp8"]
    scale: float


@dataclass
class Linear:
    """One quantized linear layer: ``y = Q(rotate(x * smooth)) @ weight.T``.

    Attributes:
        weight: already divided by ``smooth`` and rotated.
        input: how the input is quantized; None leaves it in float.
        smooth: float32 [columns], multiplied with the input in the graph; None where it is folded into what comes
            before, or not used.
        rotation: size of the Hadamard blocks the input is rotated with in the graph; 0 for none.
    """

    weight: Matrix
    input: InputQuantization | None = None
    smooth: Tensor | None = None
    rotation: int = 0


@dataclass
class QuantizedModel:
    """All that differs from the checkpoint.

    Attributes:
        linears: by parameter name, the head included where it is quantized.
        embedding: the quantized table; the very ``Matrix`` of the head's linear where both are one tensor.
        floats: parameters that stay float but have other values than the checkpoint's (norms with folded scales …).
        state: type of the SSM state at the graph's edge.
        recipe: name and content of the recipe, and what the calibration was, for the manifest.
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    embedding: Matrix | None = None
    floats: dict[str, Tensor] = field(default_factory=dict)
    divided: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name: what the checkpoint's matrix was divided by before it was rotated and rounded."""
    promoted: list[str] = field(default_factory=list)
    """Names of matrices that the recipe's budget made int8."""
    state: StateType = "fp32"
    recipe: dict[str, Any] = field(default_factory=dict)
