"""Text from a bundle: prompts in, pieces of text out as they are made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import TOKENIZER, Bundle
from mamba_export.errors import UsageError
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Runner
from mamba_export.runtime.loop import StepLoop, step_loop
from mamba_export.runtime.prefill import CHUNK, prefill_rows
from mamba_export.runtime.sampling import GREEDY, Sampler, Sampling
from mamba_export.runtime.state_file import Snapshot, to_layout
from mamba_export.runtime.text import Detokenizer, StopFilter, detokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompt = Union[str, Sequence[int]]
Model = Union[str, Path, Bundle, Runner]


@dataclass
class Sequenced:
    """One row of a generation.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the tokens made, without the one that ended the text.
        text: of ``token_ids``, up to a stop string; empty without a tokenizer.
        finish_reason: ``length``, ``eos`` or ``stop``; empty while running.
    """

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


@dataclass
class Timings:
    """Where the time went, in seconds."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From the call to the first token, loading of graphs included."""
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    engine_seconds: float = 0.0
    """The part of ``decode_seconds`` spent inside the engine."""

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens_per_second": self.tokens_per_second}


@dataclass
class Generation:
    """What :func:`generate` made: one :class:`Sequenced` a prompt, timings, and the state to continue from."""

    rows: list[Sequenced]
    timings: Timings
    snapshot: Snapshot | None = None

    @property
    def text(self) -> str:
        """The text of the only (or first) row."""
        return self.rows[0].text

    @property
    def token_ids(self) -> list[int]:
        """The new tokens of the only (or first) row."""
        return self.rows[0].token_ids


@dataclass(frozen=True)
class Piece:
    """A token as it is made. ``text`` is what it adds to the row's text: nothing while a character is incomplete."""

    row: int
    token_id: int | None
    text: str
    finish_reason: str = ""


def generate(model: Model, prompt: Prompt | Sequence[Prompt] = (), **options: Any) -> Generation:
    """Continue one prompt or a batch of them; takes what :func:`stream` takes.

    >>> generate("out/tiny", "def ", max_tokens=16).text  # doctest: +SKIP
    'read_file(path):\\n'
    """
    run = stream(model, prompt, **options)
    for _ in run:
        pass
    return run.result()


def stream(
    model: Model,
    prompt: Prompt | Sequence[Prompt] = (),
    *,
    max_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    chunk: int = CHUNK,
    step_only: bool = False,
    resume: Snapshot | None = None,
    keep_state: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: Progress = silent,
) -> TextStream:
    """Continue prompts, token by token.

    Args:
        model: a bundle or its path (run in ONNX Runtime on the CPU), or any runner.
        prompt: text or token ids, or a list of either for a batch. May be left out with ``resume``.
        max_tokens: new tokens a row.
        sampling: greedy unless told otherwise.
        stop: strings that end a row; they are not part of its text.
        ignore_eos: go on after the end-of-text token.
        chunk: tokens a prefill call takes at most; memory grows with it, not with the prompt.
        step_only: feed prompts through the step graph, so that the prefill graph is never loaded.
        resume: continue from this state; one row serves all prompts, else there is one a prompt.
        keep_state: make a :class:`Snapshot` of every row when it ends.
        tokenizer: the bundle's own when left out.
        progress: of prefill.

    Returns:
        an iterator of :class:`Piece`, with the whole as ``result()`` when it is exhausted.

    Raises:
        UsageError: a prompt is empty, an argument is out of range, or text is given and there is no tokenizer.
    """
    if max_tokens < 0 or chunk < 1:
        raise UsageError(f"max-tokens = {max_tokens} and chunk = {chunk} must be at least 0 and 1")
    runner = open_runner(model) if isinstance(model, (str, Path, Bundle)) else model
    tokenizer = tokenizer or _tokenizer_of(runner)
    if stop and tokenizer is None:
        raise UsageError("stop strings need a tokenizer, and this bundle has none")
    eos = [] if ignore_eos else _eos_ids(runner, tokenizer)
    rows = [_encode(p, tokenizer, runner.spec.vocab_size, resume is None) for p in _as_batch(prompt)]
    plan = _Plan(runner, tokenizer, max_tokens, sampling, tuple(stop), set(eos), chunk, step_only, keep_state, progress)
    return TextStream(plan, *_with_resumed(rows, resume, eos), resume)


def open_runner(model: str | Path | Bundle, device: str = "cpu", threads: int | None = None) -> Runner:
    """A bundle in ONNX Runtime, ready to run."""
    from mamba_export.runtime.ort import OrtRunner

    return OrtRunner(model if isinstance(model, Bundle) else Bundle(model), device, threads)


def _tokenizer_of(runner: Runner) -> Tokenizer | None:
    bundle = getattr(runner, "bundle", None)
    if bundle is None or not bundle.file(TOKENIZER).is_file():
        return None
    from mamba_export.tokens import load_tokenizer

    return load_tokenizer(bundle.file(TOKENIZER))


def _eos_ids(runner: Runner, tokenizer: Tokenizer | None) -> list[int]:
    bundle = getattr(runner, "bundle", None)
    if bundle is not None and bundle.manifest.eos_token_ids:
        return list(bundle.manifest.eos_token_ids)
    token = tokenizer.token_to_id("<|endoftext|>") if tokenizer is not None else None
    return [] if token is None else [token]


def _as_batch(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    items = list(prompt)
    if items and all(isinstance(item, (int, np.integer)) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _encode(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, start: bool) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("the bundle has no tokenizer", "give token ids: --tokens 12,7,300")
        return list(tokenizer.encode(prompt, add_special_tokens=start).ids)
    ids = [int(token) for token in prompt]
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise UsageError(f"token id {outside[0]} is not in 0..{vocab_size - 1}")
    return ids


def _with_resumed(
    rows: list[list[int]], resume: Snapshot | None, eos: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Per row: the tokens before this call, and the tokens that must go through the model now."""
    if resume is None:
        rows = rows or [[]]
        if any(not row for row in rows) and not eos:
            raise UsageError("the prompt is empty", "give some text: --prompt TEXT")
        return [[] for _ in rows], [row or eos[:1] for row in rows]
    held = len(resume.tokens)
    rows = rows or [[] for _ in resume.tokens]
    if held not in (1, len(rows)):
        raise UsageError(f"the state holds {held} rows, there are {len(rows)} prompts", "give one prompt a row, or none")
    before = resume.tokens if held == len(rows) else resume.tokens * len(rows)
    return [tokens[:-1] for tokens in before], [[tokens[-1], *row] for tokens, row in zip(before, rows, strict=True)]


@dataclass
class _Plan:
    runner: Runner
    tokenizer: Tokenizer | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    eos: set[int]
    chunk: int
    step_only: bool
    keep_state: bool
    progress: Progress


class TextStream(Iterator[Piece]):
    """An iterator over the pieces of a generation; see :func:`stream`."""

    def __init__(
        self, plan: _Plan, before: list[list[int]], queues: list[list[int]], resume: Snapshot | None = None
    ) -> None:
        self._plan, self._before, self._queues, self._resume = plan, before, queues, resume
        self._pending_at_end = plan.max_tokens == 0
        resumed = int(resume is not None)
        self.rows = [Sequenced(queue[resumed:]) for queue in queues]
        self.timings = Timings(prompt_tokens=sum(len(queue) for queue in queues))
        self._running = [True] * len(queues)
        self._text: list[tuple[Detokenizer, StopFilter]] = []
        if plan.tokenizer is not None:
            for old, queue in zip(before, queues, strict=True):
                self._text.append((detokenizer(plan.tokenizer, [*old, *queue]), StopFilter(plan.stop)))
        seen = [[*old, *queue] for old, queue in zip(before, queues, strict=True)]
        self._sampler = Sampler(plan.sampling, seen, plan.runner.spec.vocab_size)
        for row, state in enumerate(resume.random if resume is not None else []):
            self._sampler.restore(row, state)
        self._kept: dict[int, dict[str, NDArray[Any]]] = {}
        self._started = time.perf_counter()
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def result(self) -> Generation:
        """Everything so far; complete once the iterator is exhausted."""
        snapshot = None
        if self._plan.keep_state and len(self._kept) == len(self.rows):
            names = self._kept[0]
            arrays = {name: np.concatenate([self._kept[row][name] for row in range(len(self.rows))]) for name in names}
            tokens = [
                [*old, *queue, *row.token_ids]
                for old, queue, row in zip(self._before, self._queues, self.rows, strict=True)
            ]
            random = [self._sampler.state(row) for row in range(len(self.rows))] if self._plan.sampling.temperature else []
            snapshot = Snapshot(tokens, arrays, random)
        return Generation(self.rows, self.timings, snapshot)

    def _run(self) -> Iterator[Piece]:
        plan, queues = self._plan, [list(queue) for queue in self._queues]
        if plan.max_tokens == 0:  # the last token of a snapshot is yet to go through the model
            queues = [queue[:-1] for queue in queues]
        loop, logits = self._prefill(queues)
        self.timings.prompt_seconds = time.perf_counter() - self._started
        if plan.max_tokens == 0:
            for row in range(len(queues)):
                self._finish(row, "length", loop)
            return
        feed = np.zeros((len(queues), 1), np.int64)
        if logits is not None:
            yield from self._choose(logits, list(range(len(queues))), feed, loop)
        while any(self._running):
            logits, ready = self._step(loop, queues, feed)
            if ready:
                yield from self._choose(logits, ready, feed, loop)

    def _step(
        self, loop: StepLoop, queues: list[list[int]], feed: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], list[int]]:
        """One step of all rows; rows with prompt tokens left take the next of them. Returns who wants a token."""
        for row, queue in enumerate(queues):
            if queue:
                feed[row, 0] = queue.pop(0)
        started, engine = time.perf_counter(), loop.engine_seconds
        logits = loop.step(feed)[:, -1]
        ready = [row for row, queue in enumerate(queues) if self._running[row] and not queue]
        spent = time.perf_counter() - started
        if self.timings.first_token_seconds:
            self.timings.decode_steps += 1
            self.timings.decode_tokens += len(ready)
            self.timings.decode_seconds += spent
            self.timings.engine_seconds += loop.engine_seconds - engine
        else:
            self.timings.prompt_seconds += spent
        return logits, ready
