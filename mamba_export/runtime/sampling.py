"""Choosing the next token from logits: greedy, or drawn after temperature, top-k, top-p and min-p."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.errors import BundleError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Applied in the order of the fields, as `transformers` does.

    Attributes:
        repetition_penalty: logits of tokens seen before (prompt included) are divided by it when positive and
            multiplied when negative; 1 changes nothing.
        temperature: logits are divided by it; 0 is greedy, and everything below is ignored.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this much probability together.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        seed: of the draws. None draws differently each time.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "in (0, 100]"),
            "temperature": (0 <= self.temperature <= 100, "in [0, 100]"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise UsageError(f"{name.replace('_', '-')} = {getattr(self, name)} must be {wanted}")


GREEDY = Sampling()


def filtered_probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities of one row after temperature, top-k, top-p and min-p.

    Args:
        logits: [vocab].
        sampling: with ``temperature > 0``.

    Returns:
        float64 [vocab], summing to 1; tokens that were filtered out have 0.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    if 0 < sampling.top_k < probabilities.size:
        # A full stable sort makes ties fall the same way everywhere, which keeps seeds reproducible.
        dropped = np.argsort(-probabilities, kind="stable")[sampling.top_k :]
        probabilities[dropped] = 0
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    result: NDArray[np.float64] = probabilities / probabilities.sum()
    return result


class Sampler:
    """Chooses tokens for the rows of a batch. Each row has its own generator, so it draws the same alone or not."""

    def __init__(self, sampling: Sampling, seen: Sequence[Iterable[int]], vocab_size: int) -> None:
        """Prepare for ``len(seen)`` rows.

        Args:
            sampling: how.
            seen: the tokens each row holds so far, for the repetition penalty.
            vocab_size: columns of the logits.
        """
        self.sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._rngs = [np.random.Generator(np.random.PCG64([seed, row])) for row in range(len(seen))]
        self._seen: NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros((len(seen), vocab_size), np.bool_)
            for row, tokens in enumerate(seen):
                self._seen[row, list(tokens)] = True

    def __call__(self, logits: NDArray[np.float32], rows: Sequence[int]) -> list[int]:
        """The next token of each of ``rows``.

        Args:
            logits: [batch, vocab], of all rows of the batch.
            rows: which rows want a token.

        Raises:
            BundleError: the logits are not finite.
        """
        return [self._choose(logits[row], row) for row in rows]

    def _choose(self, logits: NDArray[np.float32], row: int) -> int:
        best = int(np.argmax(logits))  # argmax picks a NaN when there is one
        if not np.isfinite(logits[best]):
            raise BundleError("the model's logits are not finite", "export it with --dtype fp32")
        if self._seen is not None:
            seen, penalty = self._seen[row], self.sampling.repetition_penalty
            logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
            best = int(np.argmax(logits))
        if self.sampling.temperature > 0:
            cumulated = np.cumsum(filtered_probabilities(logits, self.sampling))
            draw = self._rngs[row].random() * cumulated[-1]
            best = int(np.searchsorted(cumulated, draw, side="right"))
        if self._seen is not None:
            self._seen[row, best] = True
        return best

    def state(self, row: int) -> dict[str, int]:
        """Where the row's generator stands, JSON-ready."""
        inner = self._rngs[row].bit_generator.state["state"]
        return {"state": int(inner["state"]), "inc": int(inner["inc"])}

    def restore(self, row: int, state: dict[str, int]) -> None:
        """Continue a row's draws from :meth:`state`."""
        generator = self._rngs[row].bit_generator
        generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": int(state["state"]), "inc": int(state["inc"])},
            "has_uint32": 0,
            "uinteger": 0,
        }
