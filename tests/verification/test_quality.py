"""The quality report: what a bundle loses against its checkpoint, as numbers, JSON and a page."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

from mamba_export import Bundle, quantize
from mamba_export.bundle import MANIFEST, WEIGHTS
from mamba_export.data import Tokens
from mamba_export.verification.greedy import cut_prompts
from mamba_export.verification.layers import residual_stream
from mamba_export.verification.page import quality_page
from mamba_export.verification.quality import QualityReport, quality
from tests.conftest import Cli, MakeBundle


@pytest.fixture(scope="module")
def ids() -> Tokens:
    return np.random.default_rng(0).integers(0, 4096, 1200)


@pytest.fixture(scope="module")
def exact(tiny_bundle: Path, tiny_checkpoint: Path, ids: Tokens) -> QualityReport:
    return quality(tiny_bundle, ids, tiny_checkpoint, window=256, greedy=4)


def damage(bundle: Path, folder: Path, tensor: str, factor: float) -> Path:
    """A copy of a bundle with one float32 tensor of weights.bin scaled."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.name == tensor)
    place = {item.key: item.value for item in entry.external_data}
    weights = np.memmap(folder / WEIGHTS, np.float32, "r+", int(place["offset"]), (int(place["length"]) // 4,))
    weights *= factor
    weights.flush()
    (folder / MANIFEST).write_text((bundle / MANIFEST).read_text())
    return folder


def test_an_exact_bundle_loses_nothing(exact: QualityReport) -> None:
    p = exact.perplexity
    assert p.increase is not None and p.kl_max is not None and exact.greedy is not None
    assert abs(p.increase) < 1e-5 and p.kl_max < 1e-8 and p.top1 == 1
    assert exact.greedy.agreement == exact.greedy.same_texts == 1
    assert exact.layers is not None and exact.drift is not None
    for error in exact.layers.errors:
        values = [error.hidden, error.block, error.conv_state, error.ssm_state]
        assert all(value is not None and value < 1e-5 for value in values), error
    assert exact.drift.position == [128, 256, 384, 512, 640, 768, 896, 1024]  # whole windows of 256
    assert max(exact.drift.kl) < 1e-8 and max(exact.drift.ssm_state) < 1e-5


def test_a_damaged_layer_shows_from_there_on(
    tiny_bundle: Path, tiny_checkpoint: Path, ids: Tokens, tmp_path: Path
) -> None:
    folder = damage(tiny_bundle, tmp_path / "damaged", "backbone.layers.3.mixer.out_proj.weight", 1.05)
    found = quality(Bundle(folder, check=False), ids, tiny_checkpoint, window=256, limit=2, greedy=2)
    assert found.layers is not None and found.perplexity.kl is not None
    errors = found.layers.errors
    assert errors[3].block == pytest.approx(0.05, rel=1e-2)
    assert all(e.hidden is not None and e.hidden < 1e-5 for e in errors[:3])
    assert all(e.hidden is not None and e.hidden > 1e-3 for e in errors[3:])
    assert errors[3].ssm_state is not None and errors[3].ssm_state < 1e-5
    assert errors[4].ssm_state is not None and errors[4].ssm_state > 1e-3
    assert found.perplexity.kl > 1e-6


def test_outliers_are_those_of_the_checkpoint(exact: QualityReport) -> None:
    assert exact.layers is not None
    places = {(o.layer, o.projection) for o in exact.layers.outliers}
    assert places == {(layer, name) for layer in range(6) for name in ("in_proj", "x_proj", "out_proj")}
    assert all(o.peak >= o.p999 > o.rms > 0 for o in exact.layers.outliers)


@pytest.mark.parametrize("target", ["ort", "portable", "tensorrt"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_target_shows_its_residual_stream(make_bundle: MakeBundle, target: str, dtype: str) -> None:
    path = make_bundle(target=target, dtype=dtype, logits="last") / "prefill.onnx"
    model = onnx.load(path, load_external_data=False)
    names = residual_stream(model, 6)
    assert None not in names and len(set(names)) == 7


@pytest.mark.slow
def test_a_bundle_with_the_last_logits_is_compared_too(
    make_bundle: MakeBundle, tiny_checkpoint: Path, ids: Tokens
) -> None:
    bundle = make_bundle(target="portable", logits="last")
    found = quality(bundle, ids[:300], tiny_checkpoint, window=128, greedy=2)
    assert found.layers is not None and found.drift is not None and found.perplexity.kl_max is not None
    assert found.perplexity.kl_max < 1e-8
    assert all(e.hidden is not None and e.hidden < 1e-5 for e in found.layers.errors)


@pytest.mark.slow
def test_a_quantized_bundle_with_an_int8_state_is_looked_into(
    tiny_checkpoint: Path, ids: Tokens, tmp_path: Path
) -> None:
    made = quantize(
        tiny_checkpoint, tmp_path / "q", recipe="w8a16", state="int8", target="ort", logits="all", verify=False
    )
    found = quality(made.bundle, ids, tiny_checkpoint, window=256, limit=2, greedy=2)
    assert found.bundle["recipe"] == "w8a16" and found.layers is not None and found.drift is not None
    for error in found.layers.errors:
        for value in (error.hidden, error.block, error.conv_state, error.ssm_state):
            assert value is not None and 1e-5 < value < 0.2, error
    assert len(found.drift.ssm_state) == len(found.drift.position) == 4


def test_prompts_are_spread_over_the_data() -> None:
    rows = np.arange(40 * 101).reshape(40, 101)
    assert cut_prompts(rows, 4)[:, 0].tolist() == [0, 13 * 101, 26 * 101, 39 * 101]
    assert cut_prompts(rows, 100).shape == (40, 64)
    stream = np.arange(1001)[None]
    assert cut_prompts(stream, 3)[:, 0].tolist() == [0, 468, 937]
    assert cut_prompts(stream[:, :50], 3).shape == (1, 49)


class _Checker(HTMLParser):
    """Open tags, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.external: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self.external += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(exact: QualityReport) -> None:
    page = quality_page(exact)
    checker = _Checker()
    checker.feed(page)
    assert (checker.open, checker.external, checker.svgs) == ([], [], 5)
    assert "url(" not in page and "@import" not in page and "<script" not in page
    assert "prefers-color-scheme:dark" in page
    assert set(re.findall(r'"https?://[^"]*"', page)) <= {'"http://www.w3.org/2000/svg"'}


def test_the_command_writes_table_json_and_page(
    cli: Cli, tiny_bundle: Path, tiny_checkpoint: Path, ids: Tokens, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    options = ("--data", tmp_path / "ids.npy", "--window", "128", "--limit", "2", "--ckpt", tiny_checkpoint)
    page = tmp_path / "pages" / "quality.html"
    done = cli("perplexity", tiny_bundle, *options, "--greedy", "2", "--html", page, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top1"] == 1 and found["greedy"]["same_texts"] == 1 and found["html"] == str(page)
    assert len(found["layers"]["errors"]) == 6 and found["drift"]["position"] == [128, 256]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert list(page.parent.iterdir()) == [page]
    done = cli("perplexity", tiny_bundle, *options, "--greedy", "0")
    assert done.returncode == 0, done.stderr
    for label in ("perplexity", "checkpoint", "increase", "KL divergence", "same top token"):
        assert label in done.stdout
    assert "greedy" not in done.stdout


def test_a_page_needs_a_checkpoint(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    done = cli("perplexity", tiny_bundle, "--data", "README.md", "--html", tmp_path / "page.html")
    assert done.returncode == 2 and "--ckpt" in done.stderr


def test_another_model_is_refused(
    cli: Cli, tiny_bundle: Path, shared_checkpoint: object, tmp_path: Path, ids: Tokens
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    other = shared_checkpoint("mamba1-small")  # type: ignore[operator]
    done = cli("perplexity", tiny_bundle, "--data", tmp_path / "ids.npy", "--ckpt", other)
    assert done.returncode == 2 and "not the checkpoint of this bundle" in done.stderr
