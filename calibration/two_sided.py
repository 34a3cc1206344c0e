"""Round a matrix with both factors of its Fisher information (Tseng et al. 2025, YAQA).

GPTQ lets the columns that are rounded later make up for the errors of earlier ones, each row by itself. Here rows
make up for each other as well, as far as what follows the layer can't tell them apart: ``tr(G E H Eᵀ)`` is minimized,
with E = W − Ŵ. With G = Lₒ Dₒ Lₒᵀ and H = Lᵢ Dᵢ Lᵢᵀ, unit triangular, it is the weighted sum of the squares of
``Lₒᵀ E Lᵢ``, and an element of that depends on elements of E that were rounded before and on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Store = Callable[[Tensor], Tensor]
Limits = tuple[Tensor, Tensor]
"""Least and largest integers, float32 [rows, columns]."""
_DAMPING = 0.1  # of G, relative to its mean diagonal


def two_sided(
    weight: Tensor,
    scales: Tensor,
    group: int,
    g: Tensor,
    h: Tensor,
    limits: Limits,
    store: Store,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Integers and scales of a block of rows.

    Args:
        weight: float32 [rows, columns].
        scales: float32 [rows, groups], to start from.
        group: columns that share a scale.
        g: float32 [rows, rows], of the outputs.
        h: float32 [columns, columns], of the inputs, damped.
        limits: of the integers.
        store: rounds scales to what the graph can hold.
        sweeps: of scales and integers afterwards.

    Returns:
        float integers [rows, columns], and scales.
    """
    g = g.to(weight).clone()
    g.diagonal().add_(_DAMPING * g.diagonal().mean())
    index = torch.arange(weight.shape[1], device=weight.device) // group
    q = _round_in_order(weight, scales[:, index], g, h, limits)
    for _ in range(sweeps):
        scales = _refit(weight, q, scales, index, g, h, store)
        q = _descend(weight, q, scales[:, index], g, h, limits)
    return q, scales


def _feedback(matrix: Tensor, order: Tensor) -> Tensor:
    """Strictly upper triangular: row k says what the error at place k of ``order`` does to the later ones."""
    index = order.flip(0)
    factor = torch.linalg.cholesky(matrix[index][:, index].double())
    factor = torch.flip(factor / factor.diagonal(), (0, 1))
    return (factor - torch.eye(len(order), dtype=factor.dtype, device=factor.device)).to(matrix)


def _round_in_order(weight: Tensor, spread: Tensor, g: Tensor, h: Tensor, limits: Limits) -> Tensor:
    """The most important rows and columns first. Elements on an antidiagonal do not depend on each other."""
    by_row, by_column = (torch.argsort(m.diagonal(), descending=True) for m in (g, h))
    from_rows, from_columns = _feedback(g, by_row), _feedback(h, by_column)
    w, s, low, high = (m[by_row][:, by_column] for m in (weight, spread, *limits))
    rows, columns = w.shape
    q, target, along = torch.empty_like(w), w.clone(), torch.zeros_like(w)
    for d in range(rows + columns - 1):
        top, bottom = max(0, d - columns + 1), min(rows, d + 1)
        i = torch.arange(top, bottom, device=w.device)
        j = d - i
        step, before = s[i, j], along[i, j]
        value = ((target[i, j] + before) / step).round().clamp(low[i, j], high[i, j])
        q[i, j] = value
        error = w[i, j] - value * step
        along[top:bottom].addcmul_(error[:, None], from_columns[j])
        # Columns d − bottom + 1 … d − top, each from the row of the same element.
        effect = from_rows[top:bottom] * (error + before)[:, None]
        target[:, d - bottom + 1 : d - top + 1] += effect.T.flip(1)
    back = torch.empty_like(q)
    back[by_row[:, None], by_column] = q
    return back


def _refit(weight: Tensor, q: Tensor, scales: Tensor, index: Tensor, g: Tensor, h: Tensor, store: Store) -> Tensor:
    """The best scale of one group of one row after the other."""
    scales = scales.clone()
    product = (weight - q * scales[:, index]) @ h
    own = g.diagonal()
    for group in range(scales.shape[1]):
        columns = (index == group).nonzero()[:, 0]
        piece = slice(int(columns[0]), int(columns[-1]) + 1)
        part, old = q[:, piece], scales[:, group].clone()
        along = part @ h[piece]
        curvature = ((along[:, piece] * part).sum(1) * own).tolist()
        gradient = g @ product[:, piece]
        for i in range(len(weight)):
            if not curvature[i] > 0:
                continue
            wanted = old[i] + torch.dot(gradient[i], part[i]) / curvature[i]
            if wanted > 0.5 * old[i]:
                new = store(wanted)
                gradient.addr_(g[:, i], along[i, piece], alpha=float(old[i] - new))
                scales[i, group] = new
        product += (old - scales[:, group])[:, None] * along
    return scales


def _descend(weight: Tensor, q: Tensor, spread: Tensor, g: Tensor, h: Tensor, limits: Limits) -> Tensor:
    """One sweep over the columns; in each, the integers that are not the best given all others are mended in turn."""
    q = q.clone()
    low, high = limits
    product = (weight - q * spread) @ h
    own = g.diagonal()
    for j in torch.argsort(h.diagonal(), descending=True).tolist():
        gradient = g @ product[:, j]
        curvature = own * h[j, j] * spread[:, j]
        step = gradient / curvature
        moved = ((q[:, j] + step).round().clamp(low[:, j], high[:, j]) != q[:, j]).nonzero()[:, 0]
        gain = (step.abs() * curvature * spread[:, j])[moved]
        changes = torch.zeros_like(gradient)
        for i in moved[torch.argsort(gain, descending=True)].tolist():
            best = (q[i, j] + gradient[i] / curvature[i]).round().clamp(low[i, j], high[i, j])
            change = (q[i, j] - best) * spread[i, j]
            q[i, j] = best
            changes[i] = change
            gradient.add_(g[:, i] * (change * h[j, j]))
        product.addr_(changes, h[j])
    return q
