"""One generation as it runs: prompts through prefill or steps, then a token a row and step until all rows end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.progress import Progress
from mamba_export.runtime.base import Logits, Runner
from mamba_export.runtime.loop import StepLoop, step_loop
from mamba_export.runtime.prefill import prefill_rows
from mamba_export.runtime.sampling import Sampler, Sampling
from mamba_export.runtime.state_file import Snapshot, to_layout
from mamba_export.runtime.text import Detokenizer, StopFilter, detokenizer
from mamba_export.states import Layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class Continuation:
    """One row of a generation.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the tokens made, without an end-of-text token.
        text: of ``token_ids``, up to a stop string; empty without a tokenizer.
        finish_reason: ``length``, ``eos`` or ``stop``; empty while running.
    """

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


@dataclass
class Timings:
    """Where the time went, in seconds. What the consumer of a stream does between two pieces is not counted.

    Attributes:
        prompt_tokens: of all rows.
        prompt_seconds: until the logits after the prompts.
        first_token_seconds: until the first token, loading of graphs included.
        decode_tokens: made by the steps after the first token, all rows together.
        decode_steps: number of those steps.
        decode_seconds: of those steps, with sampling and text.
        engine_seconds: the part of ``decode_seconds`` inside the engine.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    engine_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``tokens_per_second``."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass
class Generation:
    """What a generation made: one row a prompt, timings, and the state to continue from if it was asked for."""

    rows: list[Continuation]
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
    """A token as it is made.

    Attributes:
        row: which prompt it continues.
        token_id: None when the row ends without one: at an end-of-text token, or before the first token.
        text: what it adds to the row's text; empty while a character or a possible stop string is incomplete.
        finish_reason: set on a row's last piece.
    """

    row: int
    token_id: int | None
    text: str
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of a generation, checked; see :func:`mamba_export.runtime.generate.stream`."""

    runner: Runner
    tokenizer: Tokenizer | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    eos: frozenset[int]
    chunk: int
    step_only: bool
    keep_state: bool
    progress: Progress


class TextStream(Iterator[Piece]):
    """An iterator over the pieces of a generation.

    Attributes:
        rows: the continuations so far.
        timings: so far.
    """

    def __init__(self, plan: Plan, before: list[list[int]], queues: list[list[int]], resume: Snapshot | None) -> None:
        """Prepare a generation; it runs as the iterator is consumed.

        Args:
            plan: how.
            before: per row, the tokens behind the state it starts from.
            queues: per row, the tokens that go through the model first; none is empty.
            resume: the state the rows start from, of as many rows or of one for all.
        """
        self._plan, self._before, self._queues = plan, before, queues
        known = 0 if resume is None else 1  # the first token of a resumed queue is not of this prompt
        self.rows = [Continuation(queue[known:]) for queue in queues]
        self.timings = Timings(prompt_tokens=sum(len(queue) for queue in queues))
        self._start = None if resume is None else self._resumed_arrays(resume)
        context = [[*old, *queue] for old, queue in zip(before, queues, strict=True)]
        self._texts: list[tuple[Detokenizer, StopFilter]] = []
        if plan.tokenizer is not None:
            self._texts = [(detokenizer(plan.tokenizer, ids), StopFilter(plan.stop)) for ids in context]
        self._sampler = Sampler(plan.sampling, context, plan.runner.spec.vocab_size)
        if resume is not None and len(resume.random) == len(queues):
            for row, state in enumerate(resume.random):
                self._sampler.restore(row, state)
        self._running = [True] * len(queues)
        self._eos_of: dict[int, int] = {}
        self._kept: dict[int, dict[str, NDArray[Any]]] = {}
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer, so that pieces carry text."""
        return bool(self._texts)

    def result(self) -> Generation:
        """Everything so far: the whole once the iterator is exhausted."""
        return Generation(self.rows, self.timings, self._snapshot())

    # -- running ---------------------------------------------------------------------------------------------------

    def _run(self) -> Iterator[Piece]:
        if self._plan.max_tokens == 0:
            yield from self._only_prompts()
            return
        started = time.perf_counter()
        queues = [list(queue) for queue in self._queues]
        loop, logits = self._prompts(queues)
        feed = np.zeros((len(queues), 1), np.int64)
        pieces: list[Piece] = []
        if logits is not None:
            self.timings.prompt_seconds = time.perf_counter() - started
            pieces = self._choose(logits, list(range(len(queues))), feed, loop)
            self.timings.first_token_seconds = time.perf_counter() - started
        yield from pieces
        while any(self._running):
            begun, engine, first = time.perf_counter(), loop.engine_seconds, not self.timings.first_token_seconds
            logits, ready = self._step(loop, queues, feed)
            pieces = self._choose(logits, ready, feed, loop)
            if not first:
                self.timings.decode_tokens += len(ready)
                self.timings.decode_steps += 1
                self.timings.decode_seconds += time.perf_counter() - begun
                self.timings.engine_seconds += loop.engine_seconds - engine
            elif ready:
                self.timings.prompt_seconds = self.timings.first_token_seconds = time.perf_counter() - started
            yield from pieces

    def _prompts(self, queues: list[list[int]]) -> tuple[StepLoop, Logits | None]:
        """Prompts through the prefill graph; or, by steps, as far as all rows have prompt tokens left but one."""
        plan, batch = self._plan, len(queues)
        if plan.step_only or all(len(queue) == 1 for queue in queues):
            loop = step_loop(plan.runner, self._start_state(), batch)
            shared = min(len(queue) for queue in queues) - 1
            with plan.progress.stage("prompt", total=shared * batch) as tick:
                for column in range(shared):
                    loop.step(np.array([[queue[column]] for queue in queues], np.int64))
                    tick(batch)
            for queue in queues:
                del queue[:shared]
            return loop, None
        with plan.progress.stage("prompt", total=self.timings.prompt_tokens) as tick:
            logits, state = prefill_rows(plan.runner, queues, self._start, plan.chunk, tick)
        for queue in queues:
            queue.clear()
        return step_loop(plan.runner, state, batch), logits

    def _start_state(self) -> Any:
        runner = self._plan.runner
        if self._start is None:
            return runner.initial_state(len(self._queues))
        return runner.state_from_numpy(self._start)

    def _step(self, loop: StepLoop, queues: list[list[int]], feed: NDArray[np.int64]) -> tuple[Logits, list[int]]:
        """One step of all rows; those with prompt tokens left take the next one. Returns who wants a token after."""
        for row, queue in enumerate(queues):
            if queue:
                feed[row, 0] = queue.pop(0)
        logits = loop.step(feed)[:, -1]
        return logits, [row for row, queue in enumerate(queues) if self._running[row] and not queue]

    def _choose(self, logits: Logits, rows: list[int], feed: NDArray[np.int64], loop: StepLoop) -> list[Piece]:
        """A token for each of ``rows``; written to ``feed`` for the next step."""
        pieces = []
        for row, token in zip(rows, self._sampler(logits, rows), strict=True):
            feed[row, 0] = token
            pieces.append(self._take(row, token))
            if pieces[-1].finish_reason:
                self._running[row] = False
                if self._plan.keep_state:
                    self._kept[row] = {name: array[row : row + 1] for name, array in loop.state_to_numpy().items()}
        return pieces

    def _take(self, row: int, token: int) -> Piece:
        """Account for a row's new token: its text, and whether the row ends here."""
        record, text, reason = self.rows[row], "", ""
        if token in self._plan.eos:
            self._eos_of[row], reason = token, "eos"
        else:
            record.token_ids.append(token)
            if self._texts:
                characters, stops = self._texts[row]
                text = stops.add(characters.add(token))
                reason = "stop" if stops.stopped else ""
            if not reason and len(record.token_ids) == self._plan.max_tokens:
                reason = "length"
        if reason and self._texts:
            characters, stops = self._texts[row]
            text += stops.add(characters.finish()) + stops.finish()
        record.text += text
        record.finish_reason = reason
        return Piece(row, None if reason == "eos" else token, text, reason)

    def _only_prompts(self) -> Iterator[Piece]:
        """No tokens are wanted: bring each row's state to before its last token, for the snapshot."""
        started, runner = time.perf_counter(), self._plan.runner
        for row, queue in enumerate(self._queues):
            start = None if self._start is None else {name: a[row : row + 1] for name, a in self._start.items()}
            state = runner.initial_state(1) if start is None else runner.state_from_numpy(start)
            if len(queue) > 1 and self._plan.step_only:
                for token in queue[:-1]:
                    _, state = runner.step(np.array([[token]], np.int64), state)
            elif len(queue) > 1:
                _, state = prefill_rows(runner, [queue[:-1]], start, self._plan.chunk)
            self._kept[row] = runner.state_to_numpy(state)
            self.rows[row].finish_reason = "length"
            self.timings.prompt_seconds = time.perf_counter() - started
            yield Piece(row, None, "", "length")

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> Layout:
        bundle = getattr(self._plan.runner, "bundle", None)
        layout: Layout = "PN" if bundle is None else bundle.target.ssm_layout
        return layout

    def _resumed_arrays(self, resume: Snapshot) -> dict[str, NDArray[Any]]:
        """The state to start from in the runner's layout and dtypes, one row a queue."""
        runner = self._plan.runner
        like = runner.state_to_numpy(runner.initial_state(1))
        arrays = to_layout(resume.arrays, runner.spec, self._layout)
        repeats = len(self._queues) // len(resume.tokens)
        return {name: np.repeat(arrays[name].astype(like[name].dtype), repeats, axis=0) for name in like}

    def _snapshot(self) -> Snapshot | None:
        if not self._plan.keep_state or len(self._kept) < len(self.rows):
            return None
        rows = range(len(self.rows))
        arrays = {name: np.concatenate([self._kept[row][name] for row in rows]) for name in self._kept[0]}
        tokens = []
        for row in rows:
            ended = [self._eos_of[row]] if row in self._eos_of else []
            tokens.append([*self._before[row], *self._queues[row], *self.rows[row].token_ids, *ended])
        random = [self._sampler.state(row) for row in rows] if self._plan.sampling.temperature > 0 else []
        return Snapshot(tokens, to_layout(arrays, self._plan.runner.spec, self._layout), random)
