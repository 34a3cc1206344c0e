"""Hadamard rotations: what one channel holds too much of is spread over its block."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """The orthogonal, symmetric Hadamard matrix of a power of two (Sylvester)."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    scaled: Tensor = h / h.shape[0] ** 0.5
    return scaled


def block_size(columns: int, wanted: int) -> int:
    """The largest power of two that divides ``columns``, at most ``wanted``; 0 where that is no rotation."""
    size = 1
    while size * 2 <= wanted and columns % (size * 2) == 0:
        size *= 2
    return size if size > 1 else 0


def rotate(x: Tensor, size: int) -> Tensor:
    """``x`` [..., columns] with every block of ``size`` columns rotated; the rotation is its own inverse."""
    if not size:
        return x
    h = hadamard(size).to(x)
    rotated: Tensor = (x.unflatten(-1, (-1, size)) @ h).flatten(-2)
    return rotated
