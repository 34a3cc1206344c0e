"""Perplexity and what is compared with a checkpoint: scores against float64, standard errors, streams."""

from __future__ import annotations

import numpy as np
import pytest

from mamba_export.data import Tokens
from mamba_export.runtime.base import Ids, Logits, StateValues
from mamba_export.verification.perplexity import ahead, log_softmax, measure, score


class Table:
    """A runner whose logits depend on the token alone: row ``id`` of a table."""

    def __init__(self, table: Logits) -> None:
        self.table = table

    def initial_state(self, batch: int) -> StateValues:
        return {}

    def prefill(self, input_ids: Ids, state: StateValues, seq_lens: object = None) -> tuple[Logits, StateValues]:
        return self.table[input_ids], state

    def step(self, input_ids: Ids, state: StateValues) -> tuple[Logits, StateValues]:
        return self.table[input_ids], state


def make_table(seed: int, spread: float = 3.0, vocabulary: int = 97) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, (vocabulary, vocabulary)).astype(np.float32)


def make_rows(n: int, length: int) -> Tokens:
    return np.random.default_rng(9).integers(0, 97, (n, length + 1))


def test_scores_are_those_of_float64() -> None:
    logits, reference = make_table(0), make_table(1)
    targets = np.arange(97)
    found = score(logits, targets, reference)
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    assert found.reference_nll is not None and found.kl is not None and found.same is not None
    np.testing.assert_allclose(found.nll, -log_p[targets, targets], rtol=1e-6)
    np.testing.assert_allclose(found.reference_nll, -log_q[targets, targets], rtol=1e-6)
    np.testing.assert_allclose(found.kl, (np.exp(log_q) * (log_q - log_p)).sum(-1), rtol=1e-5)
    assert found.same.tolist() == (logits.argmax(-1) == reference.argmax(-1)).tolist()


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_small_divergence_does_not_drown_in_rounding(size: float) -> None:
    reference = make_table(2).astype(np.float64)
    logits = reference + np.random.default_rng(3).normal(0, size, reference.shape)
    found = score(logits.astype(np.float32), np.zeros(97, np.int64), reference.astype(np.float32)).kl
    log_p, log_q = log_softmax(logits), log_softmax(reference)
    wanted = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=2e-2)


def test_equal_models_do_not_diverge_and_opposite_ones_stay_finite() -> None:
    table = make_table(4)
    same = score(table, np.zeros(97, np.int64), table).kl
    far = score(400 * table, np.zeros(97, np.int64), -400 * table).kl
    assert same is not None and far is not None
    assert same.max() == 0
    assert np.isfinite(far).all() and (far > 0).all()


def test_windows_give_the_mean_and_its_standard_error() -> None:
    rows, table = make_rows(12, 300), make_table(5)
    report = measure(Table(table), rows, "all")  # type: ignore[arg-type]
    log_p = log_softmax(table)
    nll = np.array([-log_p[row[:-1], row[1:]].mean() for row in rows])
    assert (report.tokens, report.windows) == (3600, 12)
    assert report.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    assert report.error == pytest.approx(np.exp(nll.mean()) * nll.std(ddof=1) / np.sqrt(12), rel=1e-5)
    assert report.reference is None and report.to_dict()["kl"] is None


def test_steps_and_prefill_are_measured_alike() -> None:
    rows, table = make_rows(2, 40), make_table(5)
    found = [measure(Table(table), rows, logits).perplexity for logits in ("all", "last")]  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_stream_is_cut_into_blocks_for_its_error() -> None:
    rows, table = make_rows(1, 1000), make_table(6)
    report = measure(Table(table), rows, "all", block=300)  # type: ignore[arg-type]
    log_p = log_softmax(table)
    nll = -log_p[rows[0, :-1], rows[0, 1:]]
    assert report.windows == 4  # three of 300 and one of 100, which weighs less
    assert report.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    assert 0 < report.error < report.perplexity


def test_the_comparison_is_paired() -> None:
    rows, reference = make_rows(12, 300), make_table(5)
    table = reference + np.random.default_rng(7).normal(0, 0.05, reference.shape).astype(np.float32)
    report = measure(Table(table), rows, "all", Table(reference))  # type: ignore[arg-type]
    assert report.reference is not None and report.increase is not None and report.increase_error is not None
    assert report.kl is not None and report.kl_p99 is not None and report.kl_max is not None
    assert report.increase == pytest.approx(report.perplexity / report.reference - 1, rel=1e-4)
    assert report.increase_error < 0.2 * report.error / report.perplexity
    assert 0 < report.kl < report.kl_p99 < report.kl_max
    assert report.kl_values is not None and report.kl_values.shape == (3600,)
    assert report.top1 is not None and 0.5 < report.top1 < 1


def test_what_runs_ahead_keeps_the_order_and_passes_errors_on() -> None:
    def broken() -> object:
        yield 1
        raise ValueError("broken")

    assert list(ahead(iter(range(20)))) == list(range(20))
    with pytest.raises(ValueError, match="broken"):
        list(ahead(broken()))  # type: ignore[arg-type]
