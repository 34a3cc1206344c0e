"""Filters of the sampler against their definitions; text that arrives in fragments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_export.errors import BundleError, UsageError
from mamba_export.runtime.sampling import Sampler, Sampling, filtered_probabilities
from mamba_export.runtime.text import StopFilter, detokenizer
from mamba_export.tokens import load_tokenizer

LOGITS = np.log(np.array([0.5, 0.05, 0.3, 0.15], np.float32))


def kept(**options: float) -> set[int]:
    return set(np.flatnonzero(filtered_probabilities(LOGITS, Sampling(temperature=1.0, **options))).tolist())  # type: ignore[arg-type]


def test_filters() -> None:
    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {0, 2}
    assert kept(top_p=0.79) == {0, 2}
    assert kept(top_p=0.81) == {0, 2, 3}
    assert kept(top_p=1e-9) == {0}
    assert kept(min_p=0.25) == {0, 2, 3}
    assert kept(top_k=3, min_p=0.5) == {0, 2}
    cold = filtered_probabilities(LOGITS, Sampling(temperature=0.5))
    assert np.allclose(cold, np.array([0.5, 0.05, 0.3, 0.15]) ** 2 / 0.365, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [[]], 4)
    draws = [sampler(LOGITS[None], [0])[0] for _ in range(4000)]
    assert np.allclose(np.bincount(draws, minlength=4) / 4000, [0.5, 0.05, 0.3, 0.15], atol=0.03)


def test_repetition_penalty() -> None:
    logits = np.array([[2.0, 1.9, -1.0, -1.1]], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.2), [[0]], 4)(logits, [0]) == [1]
    sampler = Sampler(Sampling(repetition_penalty=1.2), [[]], 4)
    assert [sampler(logits, [0])[0] for _ in range(3)] == [0, 1, 0]
    assert Sampler(Sampling(repetition_penalty=2.0), [[2]], 4)(logits[:, 2:].repeat(2, 1)[:, [0, 1, 2, 3]], [0]) == [0]


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(BundleError, match="not finite"):
        Sampler(Sampling(), [[]], 3)(np.array([[1, np.nan, 2]], np.float32), [0])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"seed": -1}])
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


@given(
    st.text(alphabet="abX", max_size=30),
    st.lists(st.text(alphabet="abX", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_across_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop_filter, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stop_filter.add(piece)
        assert text.startswith(shown)
    shown += stop_filter.finish()
    # A stop string ends the text as soon as it is complete, so the first to complete counts.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:
        assert stop_filter.stopped
        assert not any(stop in shown for stop in stops)
        assert len(shown) <= min(ends)[1]


@given(st.text(max_size=40))
def test_text_is_never_cut_inside_a_character(tiny_checkpoint: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer.json")
    ids = tokenizer.encode(text).ids
    wanted = tokenizer.decode(ids)
    decoder = detokenizer(tokenizer)
    pieces = [decoder.add(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == wanted
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
