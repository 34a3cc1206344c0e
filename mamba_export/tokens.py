"""Tokenizers: text to token ids and back, through the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mamba_export.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer stored in a ``tokenizer.json``.

    Raises:
        CheckpointError: when the file is not one.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error


def check_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer and refuse it when it makes ids that the model has no embedding for.

    Raises:
        CheckpointError: when it does not fit.
    """
    tokenizer = load_tokenizer(path)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path.name} makes token ids up to {largest}, the model has {vocab_size}",
            "this tokenizer belongs to another model: replace or remove it",
        )
    return tokenizer
