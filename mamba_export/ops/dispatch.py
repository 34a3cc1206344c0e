"""What computes a torch op on a GPU: the CUDA kernel library, Triton where that is not built, the reference otherwise.

Tensors on the CPU, and float64 anywhere, take the reference. ``MAMBA_EXPORT_OPS`` set to ``cuda``, ``triton`` or
``reference`` insists on one of the three; ``cuda`` without the library lets NVRTC make the kernels that it can make.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba_export.errors import EnvironmentProblem

ENVIRONMENT_VARIABLE = "MAMBA_EXPORT_OPS"
Op = Callable[..., tuple[Tensor, Tensor]]

# Where each kind of implementation has its modules, one an op, of the op's name.
PACKAGES = {"cuda": "mamba_export.kernels", "triton": "mamba_export.kernels.triton"}
# Arguments of the torch op by position → arguments of the kernel, where the two differ.
ADAPTERS: dict[tuple[str, str], Callable[[Op], Op]] = {}


def _available(kind: str, name: str, insist: bool = False) -> bool:
    if kind == "cuda":
        library = importlib.import_module("mamba_export.kernels.library")
        return bool(library.covers(name) if insist else library.available())
    return kind == "reference" or importlib.util.find_spec("triton") is not None


@functools.cache
def kind_on_gpu(name: str) -> str:
    """``cuda``, ``triton`` or ``reference``: what op ``name`` takes on CUDA tensors in this process.

    Raises:
        EnvironmentProblem: the one that ``MAMBA_EXPORT_OPS`` names is not here.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is None:
        return next(kind for kind in (*PACKAGES, "reference") if _available(kind, name))
    if named not in (*PACKAGES, "reference"):
        raise EnvironmentProblem(f"{ENVIRONMENT_VARIABLE} is {named!r}", hint="use cuda, triton or reference")
    if not _available(named, name, insist=True):
        what = "libmamba_kernels.so" if named == "cuda" else "triton"
        raise EnvironmentProblem(f"{ENVIRONMENT_VARIABLE} asks for {named}, but {what} is not found")
    return named


@functools.cache
def implementation(name: str, kind: str) -> Op:
    """The function behind op ``name`` in the CUDA library or in Triton, called like the torch op."""
    function: Op = getattr(importlib.import_module(f"{PACKAGES[kind]}.{name}"), name)
    return ADAPTERS[name, kind](function) if (name, kind) in ADAPTERS else function


def on_gpu(name: str, reference: Op) -> Op:
    """The kernel that the torch op ``name`` registers for CUDA tensors."""

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        kind = kind_on_gpu(name)
        if kind == "reference" or arguments[0].element_size() > 4:
            return reference(*arguments)
        with torch.cuda.device(arguments[0].device):
            return implementation(name, kind)(*arguments)

    return run


def _ssd_scan_cuda(function: Op) -> Op:
    """The library's scan runs forwards only, so a reversed one gets its rows turned round, each within its length."""

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
        z: Tensor | None, seq_lens: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def turn(v: Tensor) -> Tensor:
            if seq_lens is None:
                return v.flip(1)
            position = torch.arange(v.shape[1], device=v.device)
            back = seq_lens.long()[:, None] - 1 - position
            back = torch.where(back >= 0, back, position).view(*back.shape, *[1] * (v.dim() - 2))
            return v.gather(1, back.expand(v.shape))

        if reverse:
            x, dt, B, C = (turn(v) for v in (x, dt, B, C))
            z = None if z is None else turn(z)
        y, present = function(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, (dt_min, dt_max), state, seq_lens, return_final_state=True
        )
        return (turn(y) if reverse else y), present

    return run


ADAPTERS["ssd_scan", "cuda"] = _ssd_scan_cuda
