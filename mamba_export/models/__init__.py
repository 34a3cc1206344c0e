"""The models in plain torch: one definition serves prefill and step, eager execution and tracing."""

from mamba_export.models.lm import MambaLM, build_model

__all__ = ["MambaLM", "build_model"]
