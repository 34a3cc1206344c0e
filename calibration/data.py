"""Calibration data: windows of token ids, spread over the whole of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba_export.data import Tokens, read_tokens
from mamba_export.errors import UsageError


def read_windows(
    data: str | Path | Tokens, vocab_size: int, tokenizer: Path | None, windows: int, length: int
) -> NDArray[np.int64]:
    """``windows`` windows at even distances through the data: int64 [n, length]; fewer when the data is short.

    Args:
        data: token file (.bin, .npy), text, or ids.
        vocab_size: ids must be smaller.
        tokenizer: a ``tokenizer.json``, for text.
        windows: at most.
        length: tokens a window.

    Raises:
        UsageError: there is not one window of data, or it holds ids of another vocabulary.
    """
    tokens = data if isinstance(data, np.ndarray) else read_tokens(data, vocab_size, tokenizer)
    where = "the data" if isinstance(data, np.ndarray) else str(data)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise UsageError(
            f"{where} holds token id {int(tokens.max())}, the model has {vocab_size}",
            "the data was made with another tokenizer, or is not of the type its name says",
        )
    if tokens.size < length:
        raise UsageError(
            f"{where} holds {tokens.size} tokens, less than one window of {length}", "give more data, or a --length"
        )
    fit = min(windows, tokens.size // length)
    starts = np.linspace(0, tokens.size - length, fit).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts])


def windows_sha256(ids: NDArray[np.int64]) -> str:
    """Digest of the windows' ids."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
