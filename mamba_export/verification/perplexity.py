"""Perplexity of a bundle or checkpoint on token data, and how its predictions differ from the checkpoint's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import TOKENIZER, Bundle
from mamba_export.checkpoint import open_checkpoint
from mamba_export.data import Tokens, cut_windows, read_tokens
from mamba_export.errors import UsageError
from mamba_export.extras import require
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Logits, Runner, StateValues

if TYPE_CHECKING:
    from mamba_export.runtime.torch_runner import TorchRunner

# Rows per call and tokens per piece: enough to fill the engine, small enough that [rows, piece, vocab] logits fit.
_ROWS, _PIECE = 8, 256
_BLOCK = 64


@dataclass
class PerplexityReport:
    """Result of :func:`perplexity`. What compares with a checkpoint is None without one; KL is in nats a token.

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        error: its standard error, from the spread between windows (0 for a single window).
        tokens: number of predicted tokens.
        windows: number of windows; of blocks of a stream.
        reference: perplexity of the checkpoint in torch.
        increase: of the perplexity over the reference, as a share of it: 0.01 is 1 %.
        increase_error: its standard error. Both models read the same windows, so it is far below that of either.
        kl: mean KL divergence from checkpoint to bundle.
        kl_error: its standard error.
        kl_p99: what 99 % of the positions stay below.
        kl_max: the worst position's.
        top1: share of positions where both predict the same token.
        kl_values: float32 [tokens], the divergence at every position, row by row of a batch.
    """

    perplexity: float
    error: float
    tokens: int
    windows: int
    reference: float | None = None
    increase: float | None = None
    increase_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    kl_values: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the divergences of single positions."""
        return {key: value for key, value in vars(self).items() if key != "kl_values"}


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
    rows = rows_of(opened, data, window, limit, stream)
    if ckpt is None:
        runner = open_runner(opened, device, runtime=runtime, plugin=plugin)
        return measure(runner, rows, opened.manifest.logits, None, progress, window)
    with open_reference(ckpt, opened) as (reference, threads):
        runner = open_runner(opened, device, threads, runtime=runtime, plugin=plugin)
        return measure(runner, rows, opened.manifest.logits, reference, progress, window)


def rows_of(
    bundle: Bundle, data: str | Path | Tokens, window: int = 1024, limit: int | None = None, stream: bool = False
) -> Tokens:
    """The rows of ids that :func:`measure` takes, int64 [n, L + 1]; see :func:`perplexity` for the arguments."""
    tokenizer = bundle.file(TOKENIZER)
    tokens = data if isinstance(data, np.ndarray) else read_tokens(data, bundle.spec.vocab_size, tokenizer)
    if not stream:
        return cut_windows(tokens, window, limit)
    rows: Tokens = tokens[None, : limit * window + 1 if limit else None]
    if rows.shape[1] < 2:
        raise UsageError("one token predicts nothing", "give at least two tokens")
    return rows


@contextlib.contextmanager
def open_reference(ckpt: str | Path, bundle: Bundle) -> Iterator[tuple[TorchRunner, int | None]]:
    """The checkpoint in torch, in float32, as what ``bundle`` is compared with; and the CPU threads for the bundle.

    Small models get one thread here and one there: :func:`measure` runs both at a time.

    Raises:
        UsageError: the checkpoint is another model.
    """
    require("torch", extra="export", purpose="a comparison with the checkpoint")
    from mamba_export.runtime.torch_runner import TorchRunner
    from mamba_export.verification.compare import engine_threads, torch_threads

    with open_checkpoint(ckpt) as checkpoint:
        spec, own = checkpoint.spec, bundle.spec
        if spec.vocab_size != own.vocab_size:
            raise UsageError(f"{ckpt} has {spec.vocab_size} tokens, the bundle {own.vocab_size}")
        if (spec.family, spec.n_layer, spec.d_model) != (own.family, own.n_layer, own.d_model):
            raise UsageError(
                f"{ckpt} is not the checkpoint of this bundle: {spec.family} {spec.d_model} × {spec.n_layer}, "
                f"the bundle is {own.family} {own.d_model} × {own.n_layer}",
                f"the bundle was made from '{bundle.manifest.checkpoint.get('name')}'",
            )
        with torch_threads(checkpoint.n_parameters):
            yield TorchRunner(checkpoint, layout=bundle.target.ssm_layout), engine_threads(checkpoint.n_parameters)


def measure(
    runner: Runner,
    rows: Tokens,
    logits: str,
    reference: Runner | None = None,
    progress: Progress = silent,
    block: int = 1024,
) -> PerplexityReport:
    """Perplexity of any runner over rows of ids.

    Args:
        runner: whose perplexity.
        rows: int64 [n, L + 1]: L positions each predict the token after them, from zero states.
        logits: ``all``, or ``last`` for runners whose prefill gives one row of logits: they go by steps.
        reference: another runner of the same vocabulary, with ``all`` logits, for KL and top-1.
        progress: gets told what is being done.
        block: positions of a single long row that count as a window for the standard errors.
    """
    total = _Sums(block if rows.shape[0] == 1 else rows.shape[1] - 1)
    with progress.stage("perplexity", total=rows.shape[0] * (rows.shape[1] - 1)) as tick:
        together = min(_ROWS, getattr(runner, "max_batch", _ROWS))
        for start in range(0, rows.shape[0], together):
            batch = rows[start : start + together]
            other = ahead(walk(reference, batch, "all")) if reference is not None else None
            for piece, found, _ in walk(runner, batch, logits):
                targets = batch[:, piece.start + 1 : piece.stop + 1]
                total.add(found, targets, piece.start, next(other)[1] if other is not None else None)
                tick(targets.size)
            total.end_rows()
    return total.report()


def walk(
    runner: Runner, rows: Tokens, logits: str, length: int = _PIECE
) -> Iterator[tuple[slice, Logits, StateValues]]:
    """Pieces of the sequence in order, with their logits [B, piece, V] and the state after each."""
    state = runner.initial_state(rows.shape[0])
    end = rows.shape[1] - 1
    for start in range(0, end, length):
        piece = slice(start, min(start + length, end))
        ids = np.ascontiguousarray(rows[:, piece])
        if logits == "all":
            found, state = runner.prefill(ids, state)
        else:
            parts = []
            for t in range(ids.shape[1]):
                part, state = runner.step(ids[:, t : t + 1], state)
                parts.append(part)
            found = np.concatenate(parts, axis=1)
        yield piece, found, state


T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in another thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    normalizer: NDArray[np.float64] = np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide - normalizer


@dataclass(frozen=True)
class Scores:
    """Of single positions; all arrays are [n]. The last three need a reference.

    Attributes:
        nll: negative log likelihood of the target.
        reference_nll: the reference's.
        kl: KL divergence from reference to model.
        same: both predict the same token.
    """

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64] | None = None
    kl: NDArray[np.float32] | None = None
    same: NDArray[np.bool_] | None = None


def score(logits: Logits, targets: Tokens, reference: Logits | None = None) -> Scores:
    """Scores of logits [n, V] that predict ``targets`` [n]: sums in float64, single terms in float32."""
    n = logits.shape[0]
    nll, reference_nll = np.empty(n), np.empty(n)
    kl, same = np.empty(n, np.float32), np.empty(n, np.bool_)
    for start in range(0, n, _BLOCK):  # what fits the cache
        part = slice(start, start + _BLOCK)
        log_p, nll[part] = _normalize(logits[part], targets[part])
        if reference is not None:
            log_q, reference_nll[part] = _normalize(reference[part], targets[part])
            kl[part] = _divergence(log_p, log_q)
            same[part] = log_p.argmax(-1) == log_q.argmax(-1)
    return Scores(nll) if reference is None else Scores(nll, reference_nll, kl, same)


def _normalize(logits: Logits, targets: Tokens) -> tuple[Logits, NDArray[np.float64]]:
    """Log probabilities in float32, and the negative one of each target."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    chosen = np.take_along_axis(shifted, targets[:, None], -1)[:, 0]
    return shifted - normalizer[:, None].astype(np.float32), normalizer - chosen


def _divergence(log_p: Logits, log_q: Logits) -> NDArray[np.float32]:
    """Σ q (log q - log p), each term completed with p - q, which sums to 0: then none is negative and none cancels."""
    d = log_p - log_q
    terms = np.exp(log_q) * (np.expm1(np.minimum(d, 80)) - d)
    total: NDArray[np.float32] = terms.sum(-1, dtype=np.float64).astype(np.float32)
    return np.maximum(total, 0)


class _Sums:
    """Sums over windows of ``length`` positions, or over blocks of so many of one long row."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = self.same = 0
        self.windows: list[NDArray[np.float64]] = []  # [nll, reference nll, kl, positions] each
        self.kl: list[NDArray[np.float32]] = []
        self.compared = False
        self._open: dict[tuple[int, int], NDArray[np.float64]] = {}

    def add(self, logits: Logits, targets: Tokens, start: int, reference: Logits | None) -> None:
        """Add logits [B, L, V] that predict ``targets`` [B, L] from position ``start`` of their rows on."""
        flat = targets.reshape(-1)
        other = None if reference is None else reference.reshape(flat.size, -1)
        scores = score(logits.reshape(flat.size, -1), flat, other)
        columns = [scores.nll.reshape(targets.shape)]
        if scores.reference_nll is not None and scores.kl is not None and scores.same is not None:
            self.compared = True
            self.same += int(scores.same.sum())
            self.kl.append(scores.kl)
            columns += [
                column.reshape(targets.shape) for column in (scores.reference_nll, scores.kl.astype(np.float64))
            ]
        self.tokens += targets.size
        block = (start + np.arange(targets.shape[1])) // self.length
        for number in range(int(block[0]), int(block[-1]) + 1):
            inside = block == number
            for row in range(targets.shape[0]):
                sums = self._open.setdefault((row, number), np.zeros(4))
                for i, column in enumerate(columns):
                    sums[i] += column[row, inside].sum(dtype=np.float64)
                sums[3] += inside.sum()

    def end_rows(self) -> None:
        """The rows so far are complete."""
        self.windows += self._open.values()
        self._open = {}

    def report(self) -> PerplexityReport:
        sums = np.array(self.windows)
        weights = sums[:, 3] / self.tokens
        means = sums[:, :3] / sums[:, 3:]
        value, error = _mean(means[:, 0], weights)
        report = PerplexityReport(math.exp(value), math.exp(value) * error, self.tokens, len(sums))
        if not self.compared:
            return report
        wanted, _ = _mean(means[:, 1], weights)
        ratio, ratio_error = _mean(means[:, 0] - means[:, 1], weights)
        report.reference = math.exp(wanted)
        report.increase, report.increase_error = math.expm1(ratio), math.exp(ratio) * ratio_error
        report.kl_values = np.concatenate(self.kl)
        report.kl, report.kl_error = _mean(means[:, 2], weights)
        report.kl_p99 = float(np.percentile(report.kl_values, 99))
        report.kl_max = float(report.kl_values.max())
        report.top1 = self.same / self.tokens
        return report


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """The weighted mean and its standard error; 0 for a single value."""
    mean = float((values * weights).sum())
    n = len(values)
    if n < 2:
        return mean, 0.0
    return mean, math.sqrt(float((weights * (values - mean) ** 2).sum()) / (n - 1))
