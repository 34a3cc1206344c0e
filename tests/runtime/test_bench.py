"""Measurements are counted right, whatever a machine's speed."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_export import Bundle, OrtRunner
from mamba_export.bench import Measurement, plot, run_bench
from mamba_export.errors import UsageError


def test_every_combination_is_measured(tiny_bundle: Path) -> None:
    runner = OrtRunner(Bundle(tiny_bundle, check=False), threads=2)
    found = run_bench(runner, [8, 16], [4], [1, 2], repetitions=3)
    assert [(m.test, m.batch) for m in found] == [
        *(("pp8", 1), ("pp16", 1), ("tg4", 1)),
        *(("pp8", 2), ("pp16", 2), ("tg4", 2)),
    ]
    for m in found:
        assert 0 < m.latency_ms["p50"] <= m.latency_ms["p90"] <= m.latency_ms["p99"]
        assert (m.engine_share is None) == m.test.startswith("pp")
        assert m.engine_share is None or 0.5 < m.engine_share <= 1
        assert m.peak_host > 20e6
    steps = next(m for m in found if m.test == "tg4" and m.batch == 2)
    slowest = steps.latency_ms["p99"] / 1e3
    assert steps.tokens_per_second >= 2 / slowest * 0.9


@pytest.mark.parametrize("wrong", [([], [], [1]), ([0], [0], [1]), ([-1], [1], [1]), ([1], [1], [0])])
def test_nothing_to_measure(tiny_bundle: Path, wrong: tuple[list[int], list[int], list[int]]) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        run_bench(OrtRunner(Bundle(tiny_bundle, check=False)), *wrong)


PEAK = """
import mmap
from mamba_export.runtime.memory import peak_host, reset_peak
with mmap.mmap(-1, 64 << 20) as block:
    block.write(b"x" * (64 << 20))
high = peak_host()
print(reset_peak(), high, peak_host())
"""


def test_peak_memory_starts_anew() -> None:
    # In a process of its own: what else a test process does in between would count too.
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    works, high, peak = run.stdout.split()
    if works == "False":
        pytest.skip("NOT TESTED: this system can't reset the peak")
    assert 0 < int(peak) < int(high) - (60 << 20)


def test_command(cli: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    short = ("-p", "8", "-n", "2", "-b", "1,2", "-r", "1")
    run = cli("bench", tiny_bundle, *short, "--json")
    assert run.returncode == 0, run.stderr
    assert [m["test"] for m in json.loads(run.stdout)["measurements"]] == ["pp8", "tg2", "pp8", "tg2"]
    rows = list(csv.DictReader(io.StringIO(cli("bench", tiny_bundle, *short, "--csv").stdout)))
    assert [(row["test"], row["batch"]) for row in rows] == [("pp8", "1"), ("tg2", "1"), ("pp8", "2"), ("tg2", "2")]
    assert "tokens/s" in cli("bench", tiny_bundle, *short).stdout
    assert cli("bench", tiny_bundle, "-p", "x").returncode == 2


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT TESTED: matplotlib is not installed")
    quantiles = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    rows = [Measurement(test, b, 8, 10.0 * b, 0.1, quantiles, None, 1, None) for test in ("pp8", "tg4") for b in (1, 2)]
    plot(rows, tmp_path / "speed.svg", "title")
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    with pytest.raises(UsageError, match="cannot write"):
        plot(rows, tmp_path / "speed.xyz", "title")
