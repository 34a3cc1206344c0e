"""Observers: running statistics of a stream of tensors, of a size that does not depend on how many there were.

Values are counted in bins of a sixteenth of an octave, whatever their range; so nothing has to be known beforehand,
two observers can be added up, and percentiles and least squared errors come out of the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .recipes import Inputs

_PER_OCTAVE, _LOWEST, _HIGHEST = 16, -24, 24
BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE
INT8_MAX = 127


class Observer:
    """Watches the input of one layer: per tensor (counts of |x|), per channel, and per token.

    Attributes:
        low, high: [channels], smallest and largest value.
        squares: [channels], sum of squares.
        tokens: number of tokens seen.
        counts: [BINS], values by magnitude.
        token_counts: [BINS], tokens by their largest magnitude.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.token_counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x [..., channels]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.squares += rows.square().sum(0, dtype=torch.float64)
        magnitudes = rows.abs_() if rows.data_ptr() != x.data_ptr() else rows.abs()
        self.token_counts += _count(magnitudes.amax(-1))
        self.counts += _count(magnitudes.flatten())
        self.tokens += rows.shape[0]

    @property
    def peak(self) -> Tensor:
        """[channels], largest magnitude."""
        return torch.maximum(self.high, -self.low)

    def tensors(self) -> dict[str, Tensor]:
        """What a statistics file keeps of it."""
        return {
            "low": self.low,
            "high": self.high,
            "squares": self.squares,
            "counts": self.counts,
            "token_counts": self.token_counts,
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], tokens: int) -> Observer:
        """The inverse of :meth:`tensors`."""
        observer = cls(tensors["low"].numel())
        for name, value in tensors.items():
            setattr(observer, name, value.clone())
        observer.tokens = tokens
        return observer


def _count(magnitudes: Tensor) -> Tensor:
    bins = ((torch.log2(magnitudes.clamp(min=2.0**_LOWEST)) - _LOWEST) * _PER_OCTAVE).long().clamp_(0, BINS - 1)
    return torch.bincount(bins, minlength=BINS)


def edges() -> Tensor:
    """[BINS], the upper edge of every bin."""
    return torch.exp2(torch.arange(1, BINS + 1, dtype=torch.float64) / _PER_OCTAVE + _LOWEST)


def percentile(counts: Tensor, percent: float) -> float:
    """The magnitude that ``percent`` of the counted values do not exceed, as precise as a bin."""
    running = counts.double().cumsum(0)
    wanted = running[-1] * percent / 100.0
    index = int(torch.searchsorted(running, wanted).clamp(max=BINS - 1))
    return float(edges()[index])


def least_squares(counts: Tensor, levels: int = INT8_MAX) -> float:
    """The clipping value with the least squared error of ``levels`` steps on either side of zero."""
    upper = edges().to(counts.device)
    middle = upper * 2.0 ** (-0.5 / _PER_OCTAVE)
    weight = counts.double()
    used = int(torch.nonzero(weight).max()) if bool((weight > 0).any()) else 0
    best, least = float(upper[used]), float("inf")
    for index in range(max(0, used - 6 * _PER_OCTAVE), used + 1):
        clip = upper[index]
        step = clip / levels
        inside = torch.minimum(step.square() / 12.0, middle.square())  # below half a step everything becomes zero
        error = torch.where(middle <= clip, inside, (middle - clip).square())
        total = float((weight * error).sum())
        if total < least:
            best, least = float(clip), total
    return best


def clip_value(observer: Observer, how: Inputs) -> float:
    """The largest magnitude that the static scale of a layer's input should represent."""
    peak = float(observer.peak.max())
    if how.range == "max":
        return peak
    found = percentile(observer.counts, how.percentile) if how.range == "percentile" else least_squares(observer.counts)
    return min(found, peak)
