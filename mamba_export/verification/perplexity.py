"""Perplexity of a bundle or checkpoint on token data, and how its predictions differ from the checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import TOKENIZER, Bundle
from mamba_export.checkpoint import open_checkpoint
from mamba_export.data import Tokens, cut_windows, read_tokens
from mamba_export.errors import UsageError
from mamba_export.extras import require
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Logits, Runner

# Rows per call and tokens per piece: enough to fill the engine, small enough that [rows, piece, vocab] logits fit.
_ROWS, _PIECE = 8, 256


@dataclass
class PerplexityReport:
    """Result of :func:`perplexity`.

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        error: its standard error, from the spread between windows (0 for a single window).
        tokens: number of predicted tokens.
        windows: number of windows.
        reference: perplexity of the checkpoint in torch, when one was given.
        kl: mean KL divergence from checkpoint to bundle per token, in nats.
        top1: share of positions where both predict the same token.
    """

    perplexity: float
    error: float
    tokens: int
    windows: int
    reference: float | None = None
    kl: float | None = None
    top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    bundle: str | Path | Bundle,
    data: str | Path | Tokens,
    *,
    window: int = 1024,
    limit: int | None = None,
    stream: bool = False,
    ckpt: str | Path | None = None,
    device: str = "cpu",
    runtime: str = "ort",
    plugin: str | Path | None = None,
    progress: Progress = silent,
) -> PerplexityReport:
    """Perplexity of the bundle on ``data``.

    Args:
        bundle: folder of the bundle, or an open one.
        data: token file or text (see :func:`mamba_export.data.read_tokens`), or int64 ids.
        window: positions per window, each run from zero states; every position predicts the next token.
        limit: use the first windows only (with ``stream``: the first ``limit * window`` tokens).
        stream: run the data as one sequence in pieces, carrying the state.
        ckpt: also compare with this checkpoint in torch: KL divergence and top-1 agreement.
        device: of ONNX Runtime: ``cpu`` or ``cuda``.
        runtime: ``ort``, ``tensorrt`` or ``tensorrt-rtx``.
        plugin: plugin library of the engines.
        progress: gets told what is being done.

    Raises:
        UsageError: the data does not fit the bundle.
    """
    from mamba_export.runtime.generate import open_runner

    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    tokenizer = opened.file(TOKENIZER)
    tokens = data if isinstance(data, np.ndarray) else read_tokens(data, opened.spec.vocab_size, tokenizer)
    if stream:
        rows = tokens[None, : limit * window + 1 if limit else None]
        if rows.shape[1] < 2:
            raise UsageError("one token predicts nothing", "give at least two tokens")
    else:
        rows = cut_windows(tokens, window, limit)
    runner = open_runner(opened, device, runtime=runtime, plugin=plugin)
    if ckpt is None:
        return measure(runner, rows, opened.manifest.logits, None, progress)
    require("torch", extra="export", purpose="perplexity --ckpt")
    from mamba_export.runtime.torch_runner import TorchRunner

    with open_checkpoint(ckpt) as checkpoint:
        if checkpoint.spec.vocab_size != opened.spec.vocab_size:
            raise UsageError(f"{ckpt} has {checkpoint.spec.vocab_size} tokens, the bundle {opened.spec.vocab_size}")
        return measure(runner, rows, opened.manifest.logits, TorchRunner(checkpoint), progress)


def measure(
    runner: Runner, rows: Tokens, logits: str, reference: Runner | None = None, progress: Progress = silent
) -> PerplexityReport:
    """Perplexity of any runner over rows of ids.

    Args:
        runner: whose perplexity.
        rows: int64 [n, L + 1]: L positions each predict the token after them, from zero states.
        logits: ``all``, or ``last`` for runners whose prefill gives one row of logits: they go by steps.
        reference: another runner of the same vocabulary, with ``all`` logits, for KL and top-1.
        progress: gets told what is being done.
    """
    total = _Sums()
    with progress.stage("perplexity", total=rows.shape[0] * (rows.shape[1] - 1)) as tick:
        together = min(_ROWS, getattr(runner, "max_batch", _ROWS))
        for start in range(0, rows.shape[0], together):
            batch = rows[start : start + together]
            nll = np.zeros(batch.shape[0])
            other = walk(reference, batch, "all") if reference is not None else None
            for piece, found in walk(runner, batch, logits):
                targets = batch[:, piece.start + 1 : piece.stop + 1]
                nll += total.add(found, targets, next(other)[1] if other is not None else None)
                tick(targets.size)
            total.rows.extend(nll / (rows.shape[1] - 1))
    return total.report(rows.shape[1] - 1)


def walk(runner: Runner, rows: Tokens, logits: str) -> Iterator[tuple[slice, Logits]]:
    """Pieces of the sequence in order with their logits [B, piece, V], the state carried from one to the next."""
    state = runner.initial_state(rows.shape[0])
    length = rows.shape[1] - 1
    for start in range(0, length, _PIECE):
        piece = slice(start, min(start + _PIECE, length))
        ids = np.ascontiguousarray(rows[:, piece])
        if logits == "all":
            found, state = runner.prefill(ids, state)
        else:
            parts = []
            for t in range(ids.shape[1]):
                part, state = runner.step(ids[:, t : t + 1], state)
                parts.append(part)
            found = np.concatenate(parts, axis=1)
        yield piece, found


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normalizer: NDArray[np.float64] = np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide - normalizer


class _Sums:
    """Running sums over positions."""

    def __init__(self) -> None:
        self.nll = self.reference_nll = self.kl = 0.0
        self.same = self.tokens = 0
        self.compared = False
        self.rows: list[float] = []

    def add(self, logits: Logits, targets: Tokens, reference: Logits | None) -> NDArray[np.float64]:
        """Add logits [B, L, V] that predict ``targets`` [B, L]; returns the negative log likelihood per row."""
        log_p = log_softmax(logits)
        nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        self.nll += float(nll.sum())
        self.tokens += targets.size
        if reference is not None:
            self.compared = True
            log_q = log_softmax(reference)
            self.reference_nll -= float(np.take_along_axis(log_q, targets[..., None], -1).sum())
            self.kl += float((np.exp(log_q) * (log_q - log_p)).sum())
            self.same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        per_row: NDArray[np.float64] = nll.sum(1)
        return per_row

    def report(self, window: int) -> PerplexityReport:
        mean = self.nll / self.tokens
        value = math.exp(mean)
        n = len(self.rows)
        error = value * float(np.std(self.rows, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        report = PerplexityReport(value, error, self.tokens, n)
        if self.compared:
            report.reference = math.exp(self.reference_nll / self.tokens)
            report.kl, report.top1 = self.kl / self.tokens, self.same / self.tokens
        return report
