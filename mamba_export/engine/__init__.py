"""TensorRT and TensorRT-RTX: optimization profiles, engines, the plugin library, and what an engine file holds."""

from __future__ import annotations

from mamba_export.engine.build import BuildOptions, BuildResult, build_engines
from mamba_export.engine.inspect import describe_engine
from mamba_export.engine.kit import Kit, make_kit
from mamba_export.engine.plugin import PluginLibrary, build_plugin
from mamba_export.engine.profiles import Range

__all__ = [
    "BuildOptions",
    "BuildResult",
    "Kit",
    "PluginLibrary",
    "Range",
    "build_engines",
    "build_plugin",
    "describe_engine",
    "make_kit",
]
