"""Greedy text of a bundle beside that of its checkpoint: how long the two agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_export.data import Tokens
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Runner

PROMPT, LENGTH = 64, 64


@dataclass
class GreedyReport:
    """Result of :func:`compare_greedy`.

    Attributes:
        prompts: number of prompts.
        length: tokens made of each.
        agreement: share of the tokens that come before a row's first difference, over all rows.
        same_texts: share of rows without a difference.
        first_difference: of each row; ``length`` where there is none.
        prompt_ids: [prompts, PROMPT].
        found, wanted: the tokens of bundle and checkpoint, [prompts, length].
    """

    prompts: int
    length: int
    agreement: float
    same_texts: float
    first_difference: list[int]
    prompt_ids: Tokens
    found: Tokens
    wanted: Tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the tokens."""
        return {k: v for k, v in vars(self).items() if not isinstance(v, np.ndarray)}


def cut_prompts(rows: Tokens, prompts: int) -> Tokens:
    """Up to ``prompts`` prompts of ``PROMPT`` tokens, evenly spread over ``rows`` [n, L + 1]."""
    length = min(PROMPT, rows.shape[1] - 1)
    if rows.shape[0] == 1:  # one long sequence
        starts = np.linspace(0, rows.shape[1] - length, min(prompts, rows.shape[1] // length), dtype=np.int64)
        return np.stack([rows[0, start : start + length] for start in starts])
    chosen = np.unique(np.linspace(0, rows.shape[0] - 1, min(prompts, rows.shape[0]), dtype=np.int64))
    return rows[chosen, :length]


def compare_greedy(
    runner: Runner, reference: Runner, prompts: Tokens, length: int = LENGTH, progress: Progress = silent
) -> GreedyReport:
    """Continue ``prompts`` [n, L] by ``length`` tokens with both, each on its own text, always the likeliest token."""
    with progress.stage("greedy text", total=2 * length * len(prompts)) as tick:
        found, wanted = (continue_greedily(each, prompts, length, tick) for each in (runner, reference))
    differs = found != wanted
    first = np.where(differs.any(1), differs.argmax(1), length)
    return GreedyReport(
        prompts=len(prompts),
        length=length,
        agreement=float(first.mean() / length),
        same_texts=float((first == length).mean()),
        first_difference=first.tolist(),
        prompt_ids=prompts,
        found=found,
        wanted=wanted,
    )


def continue_greedily(runner: Runner, prompts: Tokens, length: int, tick: Any = lambda done: None) -> Tokens:
    """The ``length`` likeliest tokens after each of ``prompts``, one after the other."""
    out = np.empty((len(prompts), length), np.int64)
    together = getattr(runner, "max_batch", len(prompts))  # rows an engine takes
    for start in range(0, len(prompts), together):
        rows = np.ascontiguousarray(prompts[start : start + together])
        made = out[start : start + together]
        logits, state = runner.prefill(rows, runner.initial_state(len(rows)))
        for t in range(length):
            made[:, t] = logits[:, -1].argmax(-1)
            tick(len(rows))
            if t + 1 < length:
                logits, state = runner.step(made[:, t : t + 1], state)
    return out
