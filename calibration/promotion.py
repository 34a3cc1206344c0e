"""Spend bits where they count: the 4-bit matrices that cost the most per value become int8.

What a matrix costs is what its error does to the model's predictions, by their Fisher information on the calibration
data (:mod:`.sensitivity`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mamba_export.quantized import Matrix, QuantizedModel

from .recipes import CHANNEL, Promote, Weights

WIDE = Weights("int8", CHANNEL, "rtn", "mse")
"""How a promoted matrix is rounded."""


@dataclass
class Candidate:
    """An int4 matrix that could be int8.

    Attributes:
        wide: the same matrix in int8.
        gain: by how much that brings the predictions closer to the float model's, nats a token.
    """

    wide: Matrix
    gain: float


def promote(quantized: QuantizedModel, candidates: dict[str, Candidate], how: Promote) -> list[str]:
    """Raise matrices to int8 while the linear layers' average stays below ``how.bits``; returns their names."""
    layers = [linear.weight for name, linear in quantized.linears.items() if name.startswith("backbone.layers.")]
    room = how.bits * sum(matrix.values.numel() for matrix in layers) - sum(matrix.bits for matrix in layers)
    extra = {name: found.wide.bits - quantized.linears[name].weight.bits for name, found in candidates.items()}
    chosen = []
    for name in sorted(candidates, key=lambda n: candidates[n].gain / extra[n], reverse=True):
        if candidates[name].gain > 0 and extra[name] <= room:
            room -= extra[name]
            quantized.linears[name].weight = candidates[name].wide
            chosen.append(name)
    return chosen
