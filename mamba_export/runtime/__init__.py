"""Runners: one protocol over every engine that can run a bundle, or a checkpoint."""

from mamba_export.runtime.base import Runner, StateValues
from mamba_export.runtime.ort import OrtRunner

__all__ = ["OrtRunner", "Runner", "StateValues"]
