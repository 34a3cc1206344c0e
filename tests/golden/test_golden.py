"""Trained checkpoints against goldens from other implementations, through every target that ONNX Runtime can run.

mamba1-tiny lies in the repository; the two larger models are used where they lie beside it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export import Bundle
from mamba_export.bundle import CPU_GRAPHS
from mamba_export.runtime import OrtRunner
from mamba_export.targets import TARGETS

Array = np.ndarray[Any, Any]
MODELS = ("mamba1-tiny", "mamba1-small", "mamba2-small")
FAST_TARGETS = ("ort", "portable", "tensorrt")  # the graphs of tensorrt-10.3 become those of tensorrt when run here

Ckpt = Callable[[str], Path]
MakeRunner = Callable[..., OrtRunner]
by_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def ckpt(tiny_checkpoint: Path, shared_checkpoint: Ckpt) -> Ckpt:
    """``ckpt(model)``: its folder; skips when it is not there."""
    return lambda model: tiny_checkpoint if model == tiny_checkpoint.name else shared_checkpoint(model)


@pytest.fixture(scope="module")
def make_runner(make_bundle: Callable[..., Path], ckpt: Ckpt) -> MakeRunner:
    """``make_runner(model, target, …)``: a runner over a bundle that is exported once."""

    def make(model: str, target: str, **options: Any) -> OrtRunner:
        return OrtRunner(Bundle(make_bundle(ckpt=ckpt(model), target=target, **options), check=False), threads=2)

    return make


def relative(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def golden_logits(folder: Path) -> tuple[Array, Array]:
    """Token ids [1, 192] and the logits of the last 64 positions."""
    with np.load(folder / "golden.npz") as data:
        return data["input_ids"], data["logits_last64"]


@pytest.mark.parametrize("target", TARGETS)
@by_model
def test_logits(model: str, target: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    ids, wanted = golden_logits(ckpt(model))
    runner = make_runner(model, target)
    zero = runner.initial_state(1)
    logits, _ = runner.prefill(ids, zero)
    found = logits[:, -wanted.shape[1] :]
    assert relative(found, wanted) < 1e-5
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("model", ["mamba1-tiny", "mamba1-small"])
def test_logits_of_the_graphs_for_gpus(model: str, ckpt: Ckpt, make_bundle: Callable[..., Path]) -> None:
    """On a CPU a runner takes the pair made for it; the other pair, meant for CUDA, computes the same here."""
    bundle = Bundle(make_bundle(ckpt=ckpt(model), target="ort"), check=False)
    for name in CPU_GRAPHS.values():
        del bundle.manifest.files[name]
    ids, wanted = golden_logits(ckpt(model))
    runner = OrtRunner(bundle, threads=2)
    head, state = runner.prefill(ids[:, :-1], runner.initial_state(1))
    last, _ = runner.step(ids[:, -1:], state)
    found = np.concatenate([head, last], axis=1)[:, -wanted.shape[1] :]
    assert relative(found, wanted) < 1e-5
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("target", FAST_TARGETS)
@by_model
def test_greedy_text_through_the_step_graph(model: str, target: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    """Every token, of the prompt too, goes through the step graph."""
    cases = json.loads((ckpt(model) / "golden_greedy.json").read_text())
    runner = make_runner(model, target)
    for case in cases:
        state, found = runner.initial_state(1), []
        for token in case["prompt_ids"]:
            logits, state = runner.step(np.array([[token]]), state)
        for _ in case["greedy_ids"]:
            found.append(int(logits[0, -1].argmax()))
            logits, state = runner.step(np.array([[found[-1]]]), state)
        assert found == case["greedy_ids"], case["prompt"]
    assert cases


@by_model
def test_greedy_text_after_a_prefill(model: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    runner = make_runner(model, "ort")
    for case in json.loads((ckpt(model) / "golden_greedy.json").read_text()):
        logits, state = runner.prefill(np.array([case["prompt_ids"]]), runner.initial_state(1))
        found = []
        for _ in case["greedy_ids"]:
            found.append(int(logits[0, -1].argmax()))
            logits, state = runner.step(np.array([[found[-1]]]), state)
        assert found == case["greedy_ids"], case["prompt"]


@pytest.mark.parametrize("target", FAST_TARGETS)
@by_model
def test_chunked_prefill(model: str, target: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    """Pieces of any length, the shortest shorter than the convolution, give the golden logits."""
    ids, wanted = golden_logits(ckpt(model))
    runner = make_runner(model, target)
    cuts = [0, 1, 3, 66, 67, 130, 191, 192]
    state, pieces = runner.initial_state(1), []
    for start, stop in itertools.pairwise(cuts):
        logits, state = runner.prefill(ids[:, start:stop], state)
        pieces.append(logits)
    assert relative(np.concatenate(pieces, axis=1)[:, -wanted.shape[1] :], wanted) < 1e-5


@by_model
def test_float16_agrees(model: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    """On the golden tokens and on the golden texts, fed as they were generated."""
    ids, _ = golden_logits(ckpt(model))
    sequences = [ids]
    for case in json.loads((ckpt(model) / "golden_greedy.json").read_text()):
        sequences.append(np.array([case["prompt_ids"] + case["greedy_ids"]]))
    full, half = make_runner(model, "ort"), make_runner(model, "ort", dtype="fp16")
    same = []
    for sequence in sequences:
        wanted, _ = full.prefill(sequence, full.initial_state(1))
        found, state = half.prefill(sequence, half.initial_state(1))
        same.append((found.argmax(-1) == wanted.argmax(-1)).ravel())
    assert found.dtype == np.float32
    assert half.state_to_numpy(state)["conv_state_0"].dtype == np.float16
    assert half.state_to_numpy(state)["ssm_state_0"].dtype == np.float32
    assert np.concatenate(same).mean() >= 0.99


@pytest.mark.parametrize("target", FAST_TARGETS)
@pytest.mark.parametrize("model", ["mamba1-tiny", "mamba2-small"])
def test_ragged_batches(model: str, target: str, ckpt: Ckpt, make_runner: MakeRunner) -> None:
    """Rows of different lengths in one batch, the padding full of other tokens, equal the rows alone."""
    ids, _ = golden_logits(ckpt(model))
    lens = [1, 50, 2, 31]
    batch = np.random.default_rng(0).integers(0, 4096, (len(lens), max(lens)))
    for row, length in enumerate(lens):
        batch[row, :length] = ids[0, row : row + length]
    runner = make_runner(model, target, ragged=True, logits="last")
    alone = make_runner(model, target)
    logits, state = runner.prefill(batch, runner.initial_state(len(lens)), np.array(lens, np.int32))
    found = runner.state_to_numpy(state)
    assert logits.shape == (len(lens), 1, 4096)
    for row, length in enumerate(lens):
        wanted, wanted_state = alone.prefill(batch[row : row + 1, :length], alone.initial_state(1))
        assert relative(logits[row, 0], wanted[0, -1]) < 1e-5
        for name, value in alone.state_to_numpy(wanted_state).items():
            assert relative(found[name][row], value[0]) < 1e-5, name
    longer, continued = runner.step(batch[:, :1], state)
    assert np.isfinite(longer).all()
    assert longer.shape == (len(lens), 1, 4096)
    assert set(continued) == set(state)


def test_last_logits_are_the_last_of_all(ckpt: Ckpt, make_runner: MakeRunner) -> None:
    ids, wanted = golden_logits(ckpt("mamba1-tiny"))
    last = make_runner("mamba1-tiny", "ort", logits="last")
    logits, _ = last.prefill(ids, last.initial_state(1))
    assert logits.shape == (1, 1, wanted.shape[2])
    assert relative(logits[:, 0], wanted[:, -1]) < 1e-5


def test_the_examples_and_shared_checkpoints_are_trained(ckpt: Ckpt) -> None:
    """The goldens mean something: greedy text differs between prompts and is no single repeated token."""
    cases = json.loads((ckpt("mamba1-tiny") / "golden_greedy.json").read_text())
    texts = [tuple(case["greedy_ids"]) for case in cases]
    assert len(set(texts)) == len(texts)
    assert all(len(set(text)) > 5 for text in texts)
