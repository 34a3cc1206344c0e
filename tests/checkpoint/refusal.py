"""How a checkpoint that can't be opened is refused, and a file that would run code if it were loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_export.checkpoint import open_checkpoint
from mamba_export.errors import MambaExportError

MARKER = "PWNED"


def refused(path: str | Path, kind: type[MambaExportError], *words: str, format: str | None = None) -> None:
    """Opening fails with one line that holds all the words, exactly of the class, with a hint of one line."""
    with pytest.raises(MambaExportError) as caught:
        open_checkpoint(path, format=format)
    error = caught.value
    assert type(error) is kind, repr(error)
    message = str(error)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message
    assert error.hint is None or "\n" not in error.hint
    assert error.hint or words


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def hostile_zip(path: Path) -> None:
    torch.save({"backbone.embedding.weight": torch.zeros(3), "x": Hostile()}, path)
