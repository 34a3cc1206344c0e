"""The table of targets: what a graph may contain. Adding a target is adding a row here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamba_export.errors import UsageError
from mamba_export.states import Layout

if TYPE_CHECKING:
    from mamba_export.ops.builder import Flavour


@dataclass(frozen=True)
class Target:
    """One dialect of ONNX that bundles are written in.

    Attributes:
        name: the value of ``--target``.
        runs_on: for people.
        flavour: which bodies replace ops that are not kept.
        cpu_flavour: bodies of a second pair of graphs over the same weights, written where they differ, which
            runners take on a CPU.
        plugins: keep the ``mamba`` ops as nodes, for a TensorRT plugin of that name.
        functions: attach a model-local function body to every kept op, for runtimes without the plugin.
        ssm_layout: layout of the Mamba-2 SSM state at the graph's edge.
        requires: the least version of the runtime, as a package requirement; empty when any will do.
    """

    name: str
    runs_on: str
    flavour: Flavour = "portable"
    cpu_flavour: Flavour | None = None
    plugins: bool = False
    functions: bool = False
    ssm_layout: Layout = "PN"
    requires: str = ""

    @property
    def contrib(self) -> bool:
        """Whether graphs have ONNX Runtime's own ops, of the domain com.microsoft."""
        return self.flavour != "portable"


TARGETS = {
    target.name: target
    for target in (
        Target(
            "tensorrt",
            "TensorRT with the plugin; TensorRT or ONNX Runtime without it, through the function bodies",
            plugins=True,
            functions=True,
        ),
        Target("tensorrt-10.3", "TensorRT 10.3 to 10.6 (JetPack 6) with the plugin", plugins=True),
        Target(
            "ort",
            "stock ONNX Runtime, CPU and CUDA, fast",
            flavour="ort",
            cpu_flavour="ort-cpu",
            ssm_layout="NP",
            requires="onnxruntime>=1.30",
        ),
        Target("portable", "anything that runs opset 20"),
    )
}


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: when there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"no target named '{name}'", f"one of: {', '.join(TARGETS)}")
    return TARGETS[name]
