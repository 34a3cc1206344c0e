"""Checkpoint readers: any supported format becomes a :class:`ModelSpec` and lazy weights under canonical names.

One file a format (``statespaces``, ``huggingface``, ``codestral``, ``bare``); ``detect`` finds out which, ``layout``
accounts for every tensor, ``storage`` keeps the values on disk until they are needed. Importing this needs no torch.
"""

from __future__ import annotations

from mamba_export.checkpoint.base import FORMATS, Checkpoint
from mamba_export.checkpoint.detect import open_checkpoint
from mamba_export.checkpoint.layout import expected_tensors
from mamba_export.checkpoint.storage import LazyTensor

__all__ = ["FORMATS", "Checkpoint", "LazyTensor", "expected_tensors", "open_checkpoint"]
