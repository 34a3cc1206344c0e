"""quantize --search: the frontier, what is measured once, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mamba_export.calibration.search import Frontier, Point, Recorded, frontier_page, mark_frontier

from mamba_export.verification.perplexity import measure
from tests.conftest import Cli
from tests.verification.test_perplexity import Table, make_rows, make_table

POINT = Point("a", "", "out/a", 100, 8.0, 0.01, 0.001, 1e-3, 0.99, 2.0, 500.0)


def test_the_frontier_holds_what_no_other_beats() -> None:
    points = [
        replace(POINT, recipe="float", weight_bytes=400, kl=0.0, step_ms=3.0),
        replace(POINT, recipe="w8", weight_bytes=100, kl=1e-4, step_ms=1.5),
        replace(POINT, recipe="w4", weight_bytes=50, kl=1e-3, step_ms=1.0),
        replace(POINT, recipe="worse than w8", weight_bytes=100, kl=2e-4, step_ms=1.5),
        replace(POINT, recipe="slow", weight_bytes=400, kl=1e-4, step_ms=9.0),
        replace(POINT, recipe="w4 again", weight_bytes=50, kl=1e-3, step_ms=1.0),
    ]
    assert [p.recipe for p in mark_frontier(points) if p.frontier] == ["float", "w8", "w4", "w4 again"]


def test_what_was_recorded_is_what_was_computed(tmp_path: Path) -> None:
    class Counted(Table):
        calls = 0
        spec = type("Spec", (), {"vocab_size": 97})

        def prefill(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            self.calls += 1
            return super().prefill(*args, **kwargs)  # type: ignore[arg-type]

    rows = make_rows(12, 300)
    reference = Counted(make_table(1))
    kept = Recorded(reference, tmp_path / "logits", 12 * 300 * 97)  # type: ignore[arg-type]
    found = []
    for _ in range(2):
        found.append(measure(Table(make_table(2)), rows, "all", kept))  # type: ignore[arg-type]
        kept.rewind()
    assert found[0].to_dict() == found[1].to_dict()
    assert reference.calls == 4  # two batches of rows, two pieces each


def test_the_page_names_every_recipe_and_what_was_skipped() -> None:
    points = mark_frontier([replace(POINT, recipe="float", kl=0.0, weight_bytes=400), POINT])
    page = frontier_page(Frontier("models/tiny", 2048, 7.9, points, {"fp8": "needs a <GPU>"}))
    for text in ("tiny", "float", "fp8", "needs a &lt;GPU&gt;", "<svg"):
        assert text in page
    assert "<script" not in page and "url(" not in page


@pytest.mark.slow
def test_the_command_tries_recipes(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 4096, 2100))
    options = ("--ckpt", tiny_checkpoint, "--search", "--data", tmp_path / "ids.npy", "--limit", "1")
    page = tmp_path / "page.html"
    out = tmp_path / "out"
    done = cli("quantize", *options, "--recipe", "w8a16,w8a8", "-o", out, "--html", page, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [p["recipe"] for p in found["points"]] == ["float", "w8a16"]
    assert found["points"][1]["weight_bytes"] < 0.4 * found["points"][0]["weight_bytes"]
    assert "w8a8" in found["skipped"]
    assert {p.name for p in out.iterdir()} == {"float", "w8a16"}
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_search_needs_data_and_a_quantization_a_recipe(cli: Cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = cli("quantize", "--ckpt", tiny_checkpoint, "--search", "-o", tmp_path / "out")
    assert done.returncode == 2 and "--data" in done.stderr
    done = cli("quantize", "--ckpt", tiny_checkpoint, "-o", tmp_path / "out")
    assert done.returncode == 2 and "--recipe" in done.stderr
    assert not (tmp_path / "out").exists()
