"""GPTQ (Frantar et al. 2022) and what improves on it: a search over scales, and coordinate descent on the integers.

All of them minimize ``tr((W − Ŵ) H (W − Ŵ)ᵀ)``, the squared error of the layer's output on the calibration data, with
``H = XᵀX`` over its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mamba_export.quantized import Matrix

from .recipes import Weights
from .rounding import choose_grid, store_scales
from .two_sided import Limits, two_sided

_DAMPING = 0.01
_BLOCK = 128
_SWEEPS = 4


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Weights,
    dtype: str = "fp32",
    sweeps: int = _SWEEPS,
    outputs: Sequence[Tensor] = (),
) -> Matrix:
    """Quantize a matrix so that its products with inputs like the calibration's change least.

    Args:
        weight: [rows, columns].
        hessian: float32 [columns, columns].
        scheme: of the recipe.
        dtype: of the graph, for the type of the scales.
        sweeps: of coordinate descent after GPTQ, each followed by a refit of the scales.
        outputs: diagonal blocks of G (see :mod:`.sensitivity`): the rows are then rounded with regard to each other,
            by :mod:`.two_sided`, from the scales found here.
    """
    weight, h = weight.float(), hessian.float().clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(_DAMPING * h.diagonal().mean())
    grid = choose_grid(weight, scheme, dtype, h.diagonal())
    scales, limits = grid.scales, grid.limits(weight.shape[1])
    index = torch.arange(weight.shape[1], device=weight.device) // grid.group
    q = _round_in_order(weight, h, scales[:, index], limits)
    for _ in range(sweeps):
        scales = _refit(weight, q, scales, h, index, dtype)
        q = _descend(weight, q, scales[:, index], h, limits)
    if outputs:
        store, sizes = partial(store_scales, dtype=dtype), [len(block) for block in outputs]
        rows = zip(outputs, *(m.split(sizes) for m in (weight, scales, *limits)), strict=True)
        parts = [two_sided(w, s, grid.group, g, h, (low, high), store, sweeps) for g, w, s, low, high in rows]
        q, scales = map(torch.cat, zip(*parts, strict=True))
    return grid.matrix(scheme.type, q, scales)  # type: ignore[arg-type]


def _round_in_order(weight: Tensor, h: Tensor, scales: Tensor, limits: Limits) -> Tensor:
    """GPTQ with the most active columns first and scales that are fixed beforehand; float integers [rows, columns]."""
    order = torch.argsort(h.diagonal(), descending=True)
    w, s, h = weight[:, order].clone(), scales[:, order], h[order][:, order]
    low, high = (limit[:, order] for limit in limits)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    q = torch.empty_like(w)
    for start in range(0, w.shape[1], _BLOCK):
        end = min(start + _BLOCK, w.shape[1])
        errors = torch.empty(w.shape[0], end - start, device=w.device)
        for j in range(start, end):
            q[:, j] = (w[:, j] / s[:, j]).round().clamp(low[:, j], high[:, j])
            error = (w[:, j] - q[:, j] * s[:, j]) / factor[j, j]
            w[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - start] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    back = torch.empty_like(q)
    back[:, order] = q
    return back


def _refit(weight: Tensor, q: Tensor, scales: Tensor, h: Tensor, index: Tensor, dtype: str) -> Tensor:
    """The best scales for given integers, one group after the other."""
    scales = scales.clone()
    gradient = (weight - q * scales[:, index]) @ h
    for g in range(scales.shape[1]):
        columns = index == g
        part, block = q[:, columns], h[columns]
        along = part @ block  # [rows, columns of h]
        curvature = (along[:, columns] * part).sum(1)
        slope = (gradient[:, columns] * part).sum(1)
        wanted = scales[:, g] + torch.where(curvature > 0, slope / curvature.clamp(min=1e-30), torch.zeros_like(slope))
        wanted = torch.where(wanted > 0.5 * scales[:, g], wanted, scales[:, g])
        new = store_scales(wanted, dtype)
        gradient -= (new - scales[:, g])[:, None] * along
        scales[:, g] = new
    return scales


def _descend(weight: Tensor, q: Tensor, scales: Tensor, h: Tensor, limits: Limits) -> Tensor:
    """One sweep over the columns: each is set to its best integers given all others."""
    q = q.clone()
    low, high = limits
    gradient = (weight - q * scales) @ h
    diagonal = h.diagonal()
    for j in torch.argsort(diagonal, descending=True).tolist():
        best = (q[:, j] + gradient[:, j] / (diagonal[j] * scales[:, j])).round().clamp(low[:, j], high[:, j])
        change = (best - q[:, j]) * scales[:, j]
        gradient.addr_(change, h[j], alpha=-1.0)
        q[:, j] = best
    return q


def output_error(weight: Tensor, matrix: Matrix, hessian: Tensor) -> float:
    """``tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)``: the layer's squared output error relative to its output."""
    weight, h = weight.float(), hessian.float()
    off = weight - matrix.dequantize().to(weight.device)
    return float(((off @ h) * off).sum() / ((weight @ h) * weight).sum().clamp(min=1e-30))
