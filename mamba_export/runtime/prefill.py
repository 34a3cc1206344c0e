"""Prefill of long and of unequal prompts: in chunks, so that memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.runtime.base import Ids, Logits, Runner, StateValues

CHUNK = 512
"""Tokens a prefill call takes at most, unless told otherwise."""

Tick = Callable[[int], None]


def prefill_chunks(
    runner: Runner, input_ids: Ids, state: StateValues, chunk: int = CHUNK, tick: Tick | None = None
) -> tuple[Logits, StateValues]:
    """Prefill rows of equal length, ``chunk`` tokens at a time.

    Args:
        runner: what runs it.
        input_ids: [batch, seq], seq ≥ 1.
        state: where the rows stand.
        chunk: longest piece.
        tick: called with the number of tokens (of one row) done since the last call.

    Returns:
        float32 logits [batch, vocab] after the last token, and the state there.
    """
    logits: Logits | None = None
    for start in range(0, input_ids.shape[1], chunk):
        piece = input_ids[:, start : start + chunk]
        logits, state = runner.prefill(piece, state)
        if tick is not None:
            tick(piece.shape[1])
    if logits is None:
        raise ValueError("prefill needs at least one token")
    return logits[:, -1], state


def prefill_rows(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    state: dict[str, NDArray[Any]] | None = None,
    chunk: int = CHUNK,
    tick: Tick | None = None,
) -> tuple[Logits, StateValues]:
    """Prefill prompts of different lengths, none empty.

    A ragged graph takes them together, right-padded; otherwise rows of the same length go together, and the states
    of the groups are put side by side afterwards.

    Args:
        runner: what runs it.
        rows: the prompts.
        state: host arrays [batch, …] of where the rows stand; zeros when None.
        chunk: longest piece.
        tick: called with the number of tokens done since the last call.

    Returns:
        float32 logits [batch, vocab] after each row's last token, and the states there.
    """
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        start = _start(runner, state, list(range(len(rows))))
        return prefill_chunks(runner, np.array(rows, np.int64), start, chunk, _times(tick, len(rows)))
    if getattr(runner, "ragged", False):
        return _prefill_padded(runner, rows, _start(runner, state, list(range(len(rows)))), chunk, tick)
    return _prefill_groups(runner, rows, state, chunk, tick)


def _start(runner: Runner, state: dict[str, NDArray[Any]] | None, rows: list[int]) -> StateValues:
    if state is None:
        return runner.initial_state(len(rows))
    return runner.state_from_numpy({name: np.ascontiguousarray(array[rows]) for name, array in state.items()})


def _times(tick: Tick | None, rows: int) -> Tick | None:
    return None if tick is None else lambda done: tick(done * rows)


def _prefill_padded(
    runner: Runner, rows: Sequence[Sequence[int]], state: StateValues, chunk: int, tick: Tick | None
) -> tuple[Logits, StateValues]:
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    final: Logits | None = None
    for start in range(0, padded.shape[1], chunk):
        piece = np.ascontiguousarray(padded[:, start : start + chunk])
        valid = np.clip(lengths - start, 0, piece.shape[1]).astype(np.int32)
        logits, state = runner.prefill(piece, state, valid)
        if final is None:
            final = np.zeros((len(rows), logits.shape[2]), np.float32)
        for i in np.flatnonzero((valid > 0) & (lengths - start <= chunk)).tolist():
            final[i] = logits[i, valid[i] - 1 if logits.shape[1] > 1 else -1]
        if tick is not None:
            tick(int(valid.sum()))
    assert final is not None
    return final, state


def _prefill_groups(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    state: dict[str, NDArray[Any]] | None,
    chunk: int,
    tick: Tick | None,
) -> tuple[Logits, StateValues]:
    final: Logits | None = None
    merged: dict[str, NDArray[Any]] = {}
    for length in sorted({len(row) for row in rows}):
        members = [i for i, row in enumerate(rows) if len(row) == length]
        ids = np.array([rows[i] for i in members], np.int64)
        logits, after = prefill_chunks(runner, ids, _start(runner, state, members), chunk, _times(tick, len(members)))
        if final is None:
            final = np.zeros((len(rows), logits.shape[1]), np.float32)
        final[members] = logits
        for name, array in runner.state_to_numpy(after).items():
            merged.setdefault(name, np.zeros((len(rows), *array.shape[1:]), array.dtype))[members] = array
    assert final is not None
    return final, runner.state_from_numpy(merged)
