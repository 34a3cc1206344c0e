"""Makes pure.inc: for interfaces of TensorRT's headers, classes whose methods abort."""

from __future__ import annotations

import re
from pathlib import Path

STUBS = {
    "RuntimeStub": ("nvinfer1::apiv::VRuntime", "NvInferImpl.h"),
    "EngineStub": ("nvinfer1::apiv::VCudaEngine", "NvInferImpl.h"),
    "ContextStub": ("nvinfer1::apiv::VExecutionContext", "NvInferImpl.h"),
    "RegistryStub": ("nvinfer1::IPluginRegistry", "NvInferRuntimeCommon.h"),
}


def make_pure(include: Path) -> str:
    """The text of pure.inc for the headers in a folder."""
    parts = ["#include <array>", "namespace nvinfer1 {", "using namespace apiv;"]
    for stub, (name, header) in STUBS.items():
        text = (include / header).read_text(encoding="utf-8")
        body = re.search(rf"^class {name.split('::')[-1]}\b[^;{{]*{{(.*?)^}};", text, re.MULTILINE | re.DOTALL)
        assert body is not None, name
        code = re.sub(r"//[^\n]*", "", body[1])
        parts.append(f"struct {stub} : {name} {{")
        for method in re.findall(r"virtual\s+([^;{}]*?)\s*=\s*0\s*;", code):
            if "~" not in method:
                parts.append(f"  {' '.join(method.split())} override {{ std::abort(); }}")
        parts.append("};")
    return "\n".join([*parts, "}", "using nvinfer1::RuntimeStub;", ""])
