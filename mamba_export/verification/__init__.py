"""Proof that a bundle computes what its checkpoint computes, and how well it predicts text."""

from __future__ import annotations

from mamba_export.verification.compare import verify, verify_bundle
from mamba_export.verification.report import OutputError, VerificationReport

__all__ = ["OutputError", "VerificationReport", "verify", "verify_bundle"]
