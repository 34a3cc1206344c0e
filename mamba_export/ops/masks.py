"""Masks for ragged batches: rows right-padded, `seq_lens` valid tokens each."""

from __future__ import annotations

import torch


def valid_mask(length: int, seq_lens: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: True inside the row. ``seq_lens`` is int32 [B]."""
    return torch.arange(length, device=seq_lens.device) < seq_lens[:, None]


def zero_padding(x: torch.Tensor, seq_lens: torch.Tensor | None) -> torch.Tensor:
    """``x`` [B, L, ...] with padded positions set to 0, even where they hold NaN."""
    if seq_lens is None:
        return x
    mask = valid_mask(x.shape[1], seq_lens)
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, torch.zeros((), dtype=x.dtype))
