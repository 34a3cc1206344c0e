"""Checkpoint: a spec and lazy weights under canonical names, whatever the format."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mamba_export.checkpoint.storage import LazyTensor, Weights
from mamba_export.errors import UsageError
from mamba_export.spec import ModelSpec

if TYPE_CHECKING:
    from typing_extensions import Self

FORMATS = ("state-spaces", "huggingface", "codestral", "bare")

_SHORT_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
_BLOCK = 8 << 20


class Checkpoint:
    """A trained model on disk: what it is, and its weights, read only when asked for.

    Attributes:
        path: the folder or file that was opened.
        format: one of :data:`FORMATS`.
        spec: every dimension and option.
        tensors: canonical names to lazy tensors, in model order; exactly those of ``expected_tensors(spec)``.
        config: the original config, ``{}`` for a bare file.
        config_path: the file it came from, None for a bare file.
        tokenizer: ``tokenizer.json``, if there is one.
        eos_token_ids: tokens that end a text, as far as the checkpoint says.
        assumptions: what the checkpoint leaves open and how it was read, one sentence each.
        files: the weight files.
    """

    def __init__(
        self,
        *,
        path: Path,
        format: str,
        spec: ModelSpec,
        tensors: dict[str, LazyTensor],
        weights: Weights,
        config: dict[str, Any],
        config_path: Path | None,
        tokenizer: Path | None,
        eos_token_ids: tuple[int, ...] = (),
        assumptions: list[str] | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.spec = spec
        self.tensors = tensors
        self.config = config
        self.config_path = config_path
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.assumptions = list(assumptions or [])
        self.files = list(weights.paths)
        self._weights = weights
        self._sha256: str | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {self.n_parameters:,} parameters)"

    @property
    def n_parameters(self) -> int:
        """Number of trained values; a tied head counts once."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of all tensors in the checkpoint's own dtypes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype that most parameters have: ``fp16``, ``bf16`` or ``fp32`` (also for float64)."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[_SHORT_DTYPES.get(tensor.dtype, "fp32")] += tensor.numel
        return sizes.most_common(1)[0][0]

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Digest over the weight files' bytes in sorted name order, then the config's. Streamed, computed once.

        Args:
            progress: called with the number of bytes read since the last call.
        """
        if self._sha256 is None:
            digest = hashlib.sha256()
            paths = sorted(self.files, key=lambda path: path.name)
            for path in [*paths, self.config_path] if self.config_path else paths:
                try:
                    with path.open("rb") as file:
                        while block := file.read(_BLOCK):
                            digest.update(block)
                            if progress:
                                progress(len(block))
                except OSError as error:
                    raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
            self._sha256 = digest.hexdigest()
        return self._sha256

    def close(self) -> None:
        """Close the weight files. Loaded tensors stay valid; no other can be loaded."""
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
