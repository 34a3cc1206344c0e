"""Optional packages: which extra brings what, and one way to ask for them."""

from __future__ import annotations

import importlib.util

from mamba_export.errors import MissingExtraError


def available(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(*packages: str, extra: str, purpose: str) -> None:
    """Check that optional packages are installed.

    Raises:
        MissingExtraError: names the first that is not, and the extra that brings it.
    """
    for package in packages:
        if not available(package):
            raise MissingExtraError(package, extra, purpose)
