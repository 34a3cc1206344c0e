"""Drift: whether the difference from the checkpoint grows along a long sequence, as errors enter the state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.data import Tokens
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Runner
from mamba_export.verification.perplexity import ahead, score, walk

TOKENS = 4096


@dataclass
class DriftReport:
    """Result of :func:`measure_drift`; every list has an entry a piece of the sequence.

    Attributes:
        position: tokens read at the end of the piece.
        kl: mean KL divergence within it, nats.
        nll: mean difference of the negative log likelihoods within it, nats.
        conv_state, ssm_state: relative error of all states of the kind at its end; empty where they are integers.
    """

    position: list[int]
    kl: list[float]
    nll: list[float]
    conv_state: list[float]
    ssm_state: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure_drift(
    runner: Runner, reference: Runner, ids: Tokens, logits: str, piece: int = 128, progress: Progress = silent
) -> DriftReport:
    """Run one sequence ``ids`` [L + 1] through both, the states carried from piece to piece.

    Args:
        runner: whose drift.
        reference: the checkpoint.
        ids: every token but the last is read, every one but the first predicted.
        logits: of the runner's prefill graph, ``all`` or ``last``; with the latter it goes by steps.
        piece: tokens a point of the report stands for.
        progress: gets told what is being done.
    """
    report = DriftReport([], [], [], [], [])
    rows = ids[None]
    pair = zip(walk(runner, rows, logits, piece), ahead(walk(reference, rows, "all", piece)), strict=True)
    with progress.stage("drift", total=len(ids) - 1) as tick:
        for (part, found, state), (_, wanted, other) in pair:
            scores = score(found[0], ids[part.start + 1 : part.stop + 1], wanted[0])
            assert scores.kl is not None and scores.reference_nll is not None
            report.position.append(part.stop)
            report.kl.append(float(scores.kl.mean()))
            report.nll.append(float((scores.nll - scores.reference_nll).mean()))
            ours, theirs = runner.state_to_numpy(state), reference.state_to_numpy(other)
            for kind, values in (("conv_state", report.conv_state), ("ssm_state", report.ssm_state)):
                error = _state_error(ours, theirs, kind)
                if error is not None:
                    values.append(error)
            tick(part.stop - part.start)
    return report


def _state_error(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]], kind: str) -> float | None:
    """Norm of the difference over norm of the reference, all layers together."""
    names = [name for name in wanted if name.startswith(kind)]
    if any(name not in found or found[name].dtype.kind != "f" for name in names):
        return None
    square = [(float(np.square(found[n].astype(np.float64) - wanted[n]).sum()), wanted[n]) for n in names]
    norm = sum(float(np.square(reference.astype(np.float64)).sum()) for _, reference in square)
    return float(np.sqrt(sum(difference for difference, _ in square) / max(norm, 1e-30)))
