"""Text from a bundle: prompts in, pieces of text out as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_export.bundle import TOKENIZER, Bundle
from mamba_export.errors import UsageError
from mamba_export.progress import Progress, silent
from mamba_export.runtime.base import Runner
from mamba_export.runtime.prefill import CHUNK
from mamba_export.runtime.sampling import GREEDY, Sampling
from mamba_export.runtime.state_file import Snapshot
from mamba_export.runtime.stream import Generation, Plan, TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompt = str | Sequence[int]
Model = str | Path | Bundle | Runner


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
    runner = open_runner(model, low_memory=step_only) if isinstance(model, (str, Path, Bundle)) else model
    tokenizer = tokenizer or _tokenizer_of(runner)
    if stop and tokenizer is None:
        raise UsageError("stop strings need a tokenizer, and this bundle has none")
    eos = [] if ignore_eos else _eos_ids(runner, tokenizer)
    rows = [_encode(p, tokenizer, runner.spec.vocab_size, resume is None) for p in _as_batch(prompt)]
    before, queues = _with_resumed(rows, resume, eos)
    plan = Plan(
        runner=runner,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=tuple(stop),
        eos=frozenset(eos),
        chunk=chunk,
        step_only=step_only,
        keep_state=keep_state,
        progress=progress,
    )
    return TextStream(plan, before, queues, resume)


def open_runner(
    model: str | Path | Bundle,
    device: str = "cpu",
    threads: int | None = None,
    low_memory: bool = False,
    runtime: str = "ort",
    plugin: str | Path | None = None,
) -> Runner:
    """A bundle ready to run.

    Args:
        model: a bundle or its path.
        device: of ONNX Runtime: ``cpu`` or ``cuda``.
        threads: of ONNX Runtime on the CPU.
        low_memory: of ONNX Runtime; see :class:`mamba_export.runtime.ort.OrtRunner`.
        runtime: ``ort``; or ``tensorrt`` or ``tensorrt-rtx`` for the engines in the bundle, which run on a GPU.
        plugin: plugin library of the engines; see :class:`mamba_export.runtime.trt.TrtRunner`.
    """
    opened = model if isinstance(model, Bundle) else Bundle(model)
    if runtime != "ort":
        from mamba_export.runtime.trt import TrtRunner

        return TrtRunner(opened, runtime, plugin)
    from mamba_export.runtime.ort import OrtRunner

    return OrtRunner(opened, device, threads, low_memory=low_memory)


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
        message = f"the state holds {held} rows, there are {len(rows)} prompts"
        raise UsageError(message, "give one prompt a row, or none")
    before = resume.tokens if held == len(rows) else resume.tokens * len(rows)
    return [tokens[:-1] for tokens in before], [[tokens[-1], *row] for tokens, row in zip(before, rows, strict=True)]
