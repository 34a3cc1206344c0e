"""The stand-ins promise nothing that the real libraries lack: names and parameters are compared with them."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mamba_export.errors import EnvironmentProblem
from mamba_export.extras import available
from mamba_export.runtime import trt_cuda
from tests.engine.conftest import HERE

SOURCE = ast.parse((HERE / "python" / "tensorrt" / "__init__.py").read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in SOURCE.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"}
ENUMS = [
    node.targets[0].id
    for node in SOURCE.body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "IntEnum" in ast.unparse(node.value)
]


@pytest.fixture(scope="module")
def real() -> ModuleType:
    if not available("tensorrt_rtx"):
        pytest.skip("NOT TESTED: names of TensorRT's API; TensorRT-RTX is not installed (pip install tensorrt-rtx)")
    return importlib.import_module("tensorrt_rtx")


def attributes(node: ast.ClassDef) -> set[str]:
    """Public names of a class of the stand-in: of methods and properties, and those ``__init__`` assigns."""
    found = {child.name for child in node.body if isinstance(child, (ast.FunctionDef, ast.ClassDef))}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            found.add(inner.attr)
    return {name for name in found if name[0] != "_"}


def parameters(documented: str) -> list[list[str]]:
    """Parameter names of every overload in the docstring of a bound function, without ``self``."""
    found = []
    for text in re.findall(r"^(?:\d+\. )?\w+\((.*)\)(?: ->|$)", documented, re.MULTILINE):
        names = re.findall(r"(?:^|, )\**(\w+): ", re.sub(r"\[[^\]]*\]|<[^>]*>", "", text))
        found.append([name for name in names if name != "self"])
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_of_a_class_is_real(name: str, real: ModuleType) -> None:
    there = getattr(real, name)
    missing = {attribute for attribute in attributes(CLASSES[name]) if not hasattr(there, attribute)}
    if name == "IProgressMonitor":  # its methods are for the user to write
        missing -= {"phase_start", "step_complete", "phase_finish"}
    assert not missing


METHODS = [
    (name, method.name, [argument.arg for argument in method.args.args[1:]])
    for name, node in CLASSES.items()
    for method in node.body
    if isinstance(method, ast.FunctionDef) and method.name[0] != "_" and not method.decorator_list
]


@pytest.mark.parametrize(("owner", "method", "names"), METHODS, ids=lambda value: str(value))
def test_every_parameter_is_real(owner: str, method: str, names: list[str], real: ModuleType) -> None:
    function = getattr(getattr(real, owner), method)
    if owner == "ILogger":  # a method in Python, over there too
        assert len(names) == 2
        return
    overloads = parameters(str(function.__doc__))
    assert overloads, function.__doc__
    assert any(names == overload[: len(names)] for overload in overloads), f"{names} is none of {overloads}"


@pytest.mark.parametrize("name", ENUMS)
def test_every_value_is_real(name: str, real: ModuleType) -> None:
    import sys

    sys.path.insert(0, str(HERE / "python"))
    try:
        spec = importlib.util.spec_from_file_location("standin", HERE / "python" / "tensorrt" / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    assert set(getattr(module, name).__members__) <= set(getattr(real, name).__members__)


def test_what_the_runtime_calls_of_cuda_is_real() -> None:
    """In the toolkit's own library, where there is one: every symbol is there, whatever its version."""
    try:
        library: Any = trt_cuda.library()
    except EnvironmentProblem as error:
        pytest.skip(f"NOT TESTED: symbols of CUDA's runtime library; {error}")
    assert [name for name in trt_cuda.SYMBOLS if not hasattr(library, name)] == []
    assert isinstance(library, ctypes.CDLL)


def test_signatures_agree_with_cudas_header() -> None:
    header = Path("/usr/local/cuda/include/cuda_runtime_api.h")
    if not header.is_file():
        pytest.skip(f"NOT TESTED: signatures of CUDA's runtime library; there is no {header}")
    text = re.sub(r"__dv\([^)]*\)", "", header.read_text(errors="replace"))
    for name, arguments in trt_cuda._SIGNATURES.items():
        found = re.search(rf"CUDARTAPI {name}\(([^;]*)\);", text)
        assert found is not None, name
        declared = [part.strip() for part in found[1].split(",") if part.strip() not in ("void", "")]
        assert len(declared) == len(arguments), (name, declared)
        for kind, argument in zip(arguments, declared, strict=True):
            pointer = kind in (ctypes.c_void_p,) or "POINTER" in repr(kind) or "LP_" in repr(kind)
            opaque = "*" in argument or re.match(r"cuda(Stream|Graph|GraphExec)_t", argument)
            assert bool(pointer) == bool(opaque), (name, argument)


def test_the_library_is_looked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(trt_cuda.ctypes, "CDLL", refuse)
    with pytest.raises(EnvironmentProblem, match=r"libcudart\.so, libcudart\.so\.13, libcudart\.so\.12"):
        inspect.unwrap(trt_cuda.library)()
