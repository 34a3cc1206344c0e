"""The Triton ops without a GPU: interpreted against the closed form, and compiled for every architecture."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="NOT TESTED: the Triton ops, for triton is not installed")

NAMES = ["causal_conv1d", "selective_scan", "selective_state_update", "ssd_scan", "ssd_state_update"]
PACKAGE = "kernels.triton"
ROOT = Path(__file__).resolve().parents[2]


def load() -> dict[str, ModuleType]:
    """The modules, anew."""
    for name in [n for n in sys.modules if n.startswith(PACKAGE)]:
        del sys.modules[name]
    return {name: importlib.import_module(f"{PACKAGE}.{name}") for name in ("common", *NAMES)}


@pytest.mark.slow
def test_interpreted() -> None:
    """The tests of ``triton_interpreted.py``, in a process where Triton interprets: it decides that when imported."""
    tests = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.launches.append((arguments, options))

    def compile(self, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
        launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        signature, constants = {}, {}
        for name, value in [*zip(self.kernel.arg_names, arguments, strict=False), *options.items()]:
            if name in launch:
                continue
            if name in options or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = types[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, signature, constants)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def operands(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    length = 1 if name.endswith("update") else 256

    def of(*shape: int) -> torch.Tensor:
        return torch.zeros(2, length, *shape, dtype=dtype)

    if name == "causal_conv1d":
        weights = torch.zeros(64, 4, dtype=dtype), torch.zeros(64, dtype=dtype), torch.zeros(2, 64, 3, dtype=dtype)
        return (of(64), *weights, torch.ones(2, dtype=torch.int32))
    if name.startswith("selective"):
        fixed = torch.zeros(64), torch.zeros(64), torch.zeros(2, 64, 16)
        return (of(64), of(64), torch.zeros(64, 16), of(1, 16), of(1, 16), *fixed, of(64))
    fixed = torch.zeros(4), torch.zeros(4), torch.zeros(2, 4, 64, 128)
    return (of(4, 64), of(4), torch.zeros(4), of(1, 128), of(1, 128), *fixed, of(4, 64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_every_architecture(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to make machine code; float32 on one architecture, for its products take another path."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    modules = load()
    recorders = []
    for module in (modules["common"], modules[name]):
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            recorders.append(Recorder(getattr(module, kernel)))
            monkeypatch.setattr(module, kernel, recorders[-1])
    pieces = {"pieces": 2} if name.endswith("scan") else {}
    for dtype, capabilities in ((torch.bfloat16, (87, 90, 120)), (torch.float32, (90,))):
        getattr(modules[name], name)(*operands(name, dtype), **pieces)
        for recorder in recorders:
            for arguments, options in recorder.launches:
                for capability in capabilities:
                    assert "cubin" in recorder.compile(arguments, options, capability).asm
            recorder.launches.clear()
