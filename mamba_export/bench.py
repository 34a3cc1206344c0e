"""Speed and memory of a bundle: prefill and decode, in the manner of llama-bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mamba_export.errors import MissingExtraError, UsageError
from mamba_export.extras import available
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Runner
from mamba_export.runtime.loop import step_loop
from mamba_export.runtime.memory import device_memory, peak_host, reset_peak
from mamba_export.runtime.prefill import CHUNK, prefill_chunks


class _Tick(Protocol):
    def __call__(self, done: int, /) -> None: ...


@dataclass(frozen=True)
class Measurement:
    """One row of a bench.

    Attributes:
        test: ``pp512`` (prefill of 512 tokens) or ``tg128`` (128 steps).
        batch: rows.
        tokens: of one row and repetition.
        tokens_per_second: all rows together, over all repetitions.
        deviation: standard deviation of the repetitions' tokens/s.
        latency_ms: of a prefill (the time to its first token) or a step: ``p50``, ``p90``, ``p99``.
        engine_share: part of the time inside the engine; None for a prefill.
        peak_host: largest resident memory of the process during the test, in bytes.
        device_memory: of the process after the test, in bytes; None without an NVIDIA GPU.
    """

    test: str
    batch: int
    tokens: int
    tokens_per_second: float
    deviation: float
    latency_ms: dict[str, float]
    engine_share: float | None
    peak_host: int
    device_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run_bench(
    runner: Runner,
    prompts: Sequence[int] = (512,),
    generations: Sequence[int] = (128,),
    batches: Sequence[int] = (1,),
    *,
    repetitions: int = 5,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure prefill of every length and decoding of every length, in every batch.

    Tokens are random. Every test runs once before it is measured, which also loads the graph.

    Args:
        runner: what runs the model.
        prompts: prefill lengths; none when empty or 0.
        generations: numbers of steps; none when empty or 0.
        batches: rows.
        repetitions: of each test.
        chunk: tokens a prefill call takes at most.
        progress: gets told what is being done.

    Raises:
        UsageError: a number is out of range, or nothing is left to measure.
    """
    numbers = [*prompts, *generations]
    if min([*numbers, 0]) < 0 or min([*batches, repetitions, chunk]) < 1 or not any(numbers):
        raise UsageError("there is nothing to measure", "like this: -p 512 -n 128 -b 1,8")
    tests: list[tuple[Callable[..., Measurement], int, int]] = []
    for batch in batches:
        tests += [(_prefill, length, batch) for length in prompts if length]
        tests += [(_decode, steps, batch) for steps in generations if steps]
    found = []
    with progress.stage("bench", total=len(tests) * (repetitions + 1)) as tick:
        for measure, tokens, batch in tests:
            reset_peak()
            found.append(measure(runner, tokens, batch, repetitions, chunk, tick))
    return found


def _prefill(runner: Runner, length: int, batch: int, repetitions: int, chunk: int, tick: _Tick) -> Measurement:
    ids = _random_ids(runner, (batch, length))
    spent = []
    for repetition in range(repetitions + 1):
        state = runner.initial_state(batch)
        started = time.perf_counter()
        prefill_chunks(runner, ids, state, chunk)
        if repetition:
            spent.append(time.perf_counter() - started)
        tick(1)
    return _measurement(f"pp{length}", batch, length, spent, spent, None)


def _decode(runner: Runner, steps: int, batch: int, repetitions: int, chunk: int, tick: _Tick) -> Measurement:
    """Steps that depend on each other, as in greedy decoding: the choice of the token is part of the time."""
    spent, latencies, engine = [], [], 0.0
    for repetition in range(repetitions + 1):
        loop = step_loop(runner, runner.initial_state(batch), batch)
        ids = _random_ids(runner, (batch, 1))
        loop.step(ids)  # the first touches the buffers
        before, started = loop.engine_seconds, time.perf_counter()
        last = started
        times = []
        for _ in range(steps):
            ids = loop.step(ids)[:, -1].argmax(-1, keepdims=True)
            now = time.perf_counter()
            times.append(now - last)
            last = now
        if repetition:
            spent.append(last - started)
            latencies += times
            engine += loop.engine_seconds - before
        tick(1)
    return _measurement(f"tg{steps}", batch, steps, spent, latencies, engine / sum(spent))


def _random_ids(runner: Runner, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, runner.spec.vocab_size, shape)


def _measurement(
    test: str, batch: int, tokens: int, spent: list[float], latencies: list[float], share: float | None
) -> Measurement:
    speeds = batch * tokens / np.array(spent)
    quantiles = np.percentile(np.array(latencies) * 1e3, [50, 90, 99])
    return Measurement(
        test=test,
        batch=batch,
        tokens=tokens,
        tokens_per_second=batch * tokens * len(spent) / sum(spent),
        deviation=float(speeds.std()),
        latency_ms={name: float(value) for name, value in zip(("p50", "p90", "p99"), quantiles, strict=True)},
        engine_share=share,
        peak_host=peak_host(),
        device_memory=device_memory(),
    )


def plot(measurements: Sequence[Measurement], path: str | Path, title: str) -> None:
    """Draw tokens/s against the batch, a line a test; the suffix of ``path`` says the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the file can't be written, or its format is not known.
    """
    if not available("matplotlib"):
        raise MissingExtraError("matplotlib", "report", "a plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for test in dict.fromkeys(m.test for m in measurements):
        rows = [m for m in measurements if m.test == test]
        deviations = [m.deviation for m in rows]
        axes.errorbar([m.batch for m in rows], [m.tokens_per_second for m in rows], deviations, marker="o", label=test)
    axes.set(xlabel="batch", ylabel="tokens/s", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {error}") from error
