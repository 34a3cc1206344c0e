"""The quality report: what a bundle, quantized or not, loses against the checkpoint it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamba_export.bundle import TOKENIZER, Bundle
from mamba_export.data import Tokens
from mamba_export.progress import Progress, silent
from mamba_export.verification.drift import TOKENS, DriftReport, measure_drift
from mamba_export.verification.greedy import GreedyReport, compare_greedy, cut_prompts
from mamba_export.verification.layers import LayerReport, compare_layers
from mamba_export.verification.perplexity import PerplexityReport, measure, open_reference, rows_of

# Tokens of the look into the layers: they are run in one call.
_INSIDE = 512


@dataclass
class QualityReport:
    """Result of :func:`quality`.

    Attributes:
        bundle: what was measured: path, target, dtype, bytes, and the recipe of a quantized bundle.
        checkpoint: as it was given.
        data: as it was given.
        perplexity: perplexity, KL divergence and top-1 agreement.
        greedy: agreement of greedy text; None if no prompts were asked for.
        layers: errors and outliers layer by layer; None without ``details``.
        drift: along one sequence; None without ``details``.
        texts: of the greedy prompts, where the bundle has a tokenizer: prompt, bundle's, checkpoint's.
    """

    bundle: dict[str, Any]
    checkpoint: str
    data: str
    perplexity: PerplexityReport
    greedy: GreedyReport | None = None
    layers: LayerReport | None = None
    drift: DriftReport | None = None
    texts: list[tuple[str, str, str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the perplexity report's fields at the top, the others under their names."""
        parts = {"greedy": self.greedy, "layers": self.layers, "drift": self.drift}
        return {
            **self.perplexity.to_dict(),
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "data": self.data,
            **{name: None if part is None else part.to_dict() for name, part in parts.items()},
        }


def quality(
    bundle: str | Path | Bundle,
    data: str | Path | Tokens,
    ckpt: str | Path,
    *,
    window: int = 1024,
    limit: int | None = None,
    stream: bool = False,
    device: str = "cpu",
    runtime: str = "ort",
    plugin: str | Path | None = None,
    greedy: int = 16,
    details: bool = True,
    progress: Progress = silent,
) -> QualityReport:
    """Compare a bundle with its checkpoint in torch, in float32.

    Args:
        bundle: folder of the bundle, or an open one.
        data: see :func:`mamba_export.perplexity`.
        ckpt: folder, file or hub id of the checkpoint it was made from.
        window: positions per window.
        limit: use the first windows only.
        stream: run the data as one sequence.
        device: of ONNX Runtime: ``cpu`` or ``cuda``.
        runtime: ``ort``, ``tensorrt`` or ``tensorrt-rtx``; the look into the layers is always ONNX Runtime's.
        plugin: plugin library of the engines.
        greedy: prompts, cut from the data, whose greedy continuations are compared; 0 for none.
        details: also look into the layers, and measure drift along 4,096 tokens.
        progress: gets told what is being done.

    Raises:
        UsageError: the data does not fit the bundle, or the checkpoint is another model.
    """
    from mamba_export.runtime.generate import open_runner
    from mamba_export.runtime.ort import OrtRunner

    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    rows = rows_of(opened, data, window, limit, stream)
    with open_reference(ckpt, opened) as (reference, threads):
        runner = open_runner(opened, device, threads, runtime=runtime, plugin=plugin)
        logits = opened.manifest.logits
        report = QualityReport(
            _facts(opened),
            str(ckpt),
            "token ids" if isinstance(data, np.ndarray) else str(data),
            measure(runner, rows, logits, reference, progress, window),
        )
        if greedy:
            prompts = cut_prompts(rows, greedy)
            report.greedy = compare_greedy(runner, reference, prompts, progress=progress)
            report.texts = _texts(opened, report.greedy)
        if details:
            with progress.stage("layers"):
                inner = runner if isinstance(runner, OrtRunner) else OrtRunner(opened, "cpu", threads)
                report.layers = compare_layers(opened, inner, reference, np.ascontiguousarray(rows[:1, :_INSIDE]))
            report.drift = measure_drift(runner, reference, _sequence(rows), logits, progress=progress)
    return report


def _sequence(rows: Tokens) -> Tokens:
    """The first tokens of the data; windows [n, L + 1] overlap by one."""
    joined = np.concatenate([rows[0, :1], rows[: TOKENS // max(rows.shape[1] - 1, 1) + 1, 1:].reshape(-1)])
    return joined[: TOKENS + 1]


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    facts: dict[str, Any] = {
        "path": str(bundle.path),
        "target": manifest.target,
        "dtype": manifest.dtype,
        "model": manifest.checkpoint.get("name"),
        "family": bundle.spec.family,
        "bytes": bundle.nbytes,
    }
    if manifest.quantization:
        facts["recipe"] = manifest.quantization.get("name")
    return facts


def _texts(bundle: Bundle, greedy: GreedyReport) -> list[tuple[str, str, str]] | None:
    if not bundle.file(TOKENIZER).is_file():
        return None
    from mamba_export.tokens import load_tokenizer

    tokenizer = load_tokenizer(bundle.file(TOKENIZER))
    rows = zip(greedy.prompt_ids, greedy.found, greedy.wanted, strict=True)
    return [tuple(str(tokenizer.decode(ids.tolist())) for ids in row) for row in rows]  # type: ignore[misc]
