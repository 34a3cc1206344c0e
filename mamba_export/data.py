"""Token data: files of token ids or text, and windows cut from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import UsageError

Tokens = NDArray[np.int64]


def read_tokens(path: str | Path, vocab_size: int, tokenizer: Path | None = None) -> Tokens:
    """Token ids from a file.

    Args:
        path: ``.bin`` (uint16 little-endian ids), ``.npy`` (one-dimensional, integer) or UTF-8 text.
        vocab_size: ids must be smaller.
        tokenizer: a ``tokenizer.json``, needed for text.

    Returns:
        int64 [n].

    Raises:
        UsageError: the file is missing, of another type, empty, or holds ids of another vocabulary.
    """
    source = Path(path)
    if not source.is_file():
        raise UsageError(f"no such data file: {source}")
    readers = {".bin": _read_bin, ".npy": _read_npy}
    reader = readers.get(source.suffix)
    tokens = reader(source) if reader is not None else _read_text(source, tokenizer)
    if tokens.size == 0:
        raise UsageError(f"{source} holds no tokens")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(
            f"{source} holds token id {high if high >= vocab_size else low}, the model has {vocab_size}",
            "the data was made with another tokenizer, or is not of the type its name says",
        )
    return tokens


def _read_bin(path: Path) -> Tokens:
    if path.stat().st_size % 2:
        raise UsageError(f"{path} has an odd number of bytes", ".bin files hold uint16 little-endian token ids")
    return np.fromfile(path, dtype="<u2").astype(np.int64)


def _read_npy(path: Path) -> Tokens:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path} is not a .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{path} must hold a one-dimensional integer array", "save it with numpy.save(path, ids)")
    return array.astype(np.int64)


def _read_text(path: Path, tokenizer: Path | None) -> Tokens:
    from mamba_export.tokens import load_tokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is neither UTF-8 text nor a token file", "token files end in .bin (uint16) or .npy"
        ) from error
    if tokenizer is None or not tokenizer.is_file():
        raise UsageError(f"{path} is text, and the bundle has no tokenizer", "give token ids as .bin or .npy")
    return np.array(load_tokenizer(tokenizer).encode(text).ids, dtype=np.int64)


def cut_windows(tokens: Tokens, length: int, limit: int | None = None) -> Tokens:
    """Non-overlapping windows with the token that follows each: int64 [n, length + 1], rows overlap by one.

    Args:
        tokens: int64 [n_tokens].
        length: positions per window; every one predicts the next token.
        limit: keep the first windows only.

    Raises:
        UsageError: when there is not a single window.
    """
    n = (tokens.size - 1) // length
    if n < 1:
        raise UsageError(
            f"{tokens.size} tokens do not fill one window of {length} and the token after it", "use a smaller --window"
        )
    n = min(n, limit) if limit is not None else n
    return np.stack([tokens[i * length : i * length + length + 1] for i in range(n)])
