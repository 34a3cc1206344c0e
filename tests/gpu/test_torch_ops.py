"""The torch ops on CUDA tensors: each implementation against the closed form, and the whole model against the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mamba_export.ops import dispatch  # noqa: E402
from tests.ops.oracle import assert_closed_form, oracle, relative  # noqa: E402
from tests.ops.samples import KINDS, Kind, Sample, examples, ragged_samples, run, run_step, samples  # noqa: E402

# In units of the sum of magnitudes of all terms. An exponential near the end of float32's range carries the rounding of
# an argument of up to 126; products of bfloat16 and float16 are rounded before the second product of a chunk.
LIMIT = {torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
IMPLEMENTATIONS = ("cuda", "nvrtc", "triton", "reference")
by_kind = pytest.mark.parametrize("kind", KINDS)
by_dtype = pytest.mark.parametrize("dtype", LIMIT, ids=str)


@pytest.fixture(params=IMPLEMENTATIONS, scope="module", autouse=True)
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this file runs once with each implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kind_on_gpu", lambda name: request.param)
        if request.param == "nvrtc":  # for the ops that it makes; the others take Triton
            library = importlib.import_module("mamba_export.kernels.library")
            patch.setattr(library, "available", lambda: False)
            patch.setattr(dispatch, "kind_on_gpu", lambda name: "cuda" if library.covers(name) else "triton")
            assert library.covers("causal_conv1d"), "NOT TESTED: libnvrtc is not found"
        yield request.param


def moved(sample: Sample) -> Sample:
    sample = sample.map_time(lambda x: x.cuda())
    return replace(sample, fixed={k: v.cuda() for k, v in sample.fixed.items()}, state=sample.state.cuda())


def on_cpu(result: tuple[Any, Any]) -> tuple[Any, Any]:
    return result[0].float().cpu(), result[1].float().cpu()


@by_dtype
@by_kind
@given(data=st.data())
@examples(6)
def test_closed_form(kind: Kind, dtype: Any, data: st.DataObject) -> None:
    sample = data.draw(samples(kind, extreme=None if dtype == torch.float32 else False, max_length=80)).to(dtype)
    result = run(moved(sample))
    assert result[0].dtype == dtype and result[0].is_cuda
    y, present = on_cpu(result)
    exact_y, exact, y_size, size = oracle(sample)
    assert (
        relative(y, exact_y, y_size + (1e-4 if dtype == torch.float16 else 0.0)) < LIMIT[dtype]
    )  # small ones are coarse
    assert relative(present, exact, size) < LIMIT[torch.float32 if kind == "scan" else dtype]


@by_kind
@given(data=st.data())
@examples(6)
def test_steps_and_padding(kind: Kind, data: st.DataObject) -> None:
    token = data.draw(samples(kind, reverse=False, extreme=False, max_length=1))
    assert_closed_form(on_cpu(run_step(moved(token))), token, LIMIT[torch.float32], LIMIT[torch.float32])
    sample, lens = data.draw(ragged_samples(kind))
    y, present = on_cpu(run(moved(sample), lens.cuda()))
    for row, length in enumerate(lens.tolist()):
        assert not y[row, length:].any()
        if length == 0:
            assert torch.equal(present[row], sample.state[row])
        else:
            alone, found = sample.row(row, length), (y[row : row + 1, :length], present[row : row + 1])
            assert_closed_form(found, alone, LIMIT[torch.float32], LIMIT[torch.float32])


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_the_model_gives_the_same_on_both(layer: str, tmp_path: Path) -> None:
    from mamba_export.checkpoint import open_checkpoint
    from mamba_export.runtime.torch_runner import TorchRunner
    from tests.make_checkpoints import make_statespaces

    sizes = {"d_state": 16} if layer == "Mamba1" else {"d_state": 64, "headdim": 32}
    folder = make_statespaces(tmp_path, d_model=64, n_layer=2, vocab_size=100, ssm_cfg={"layer": layer, **sizes})
    checkpoint, results = open_checkpoint(folder), []
    for device in ("cpu", "cuda"):
        runner = TorchRunner(checkpoint, device=device)
        ids = np.random.default_rng(0).integers(0, 100, (2, 70))
        prefill, state = runner.prefill(ids, runner.initial_state(2), np.array([70, 33], np.int32))
        step, state = runner.step(ids[:, :1], state)
        results.append([prefill, step, *runner.state_to_numpy(state).values()])
    for cpu, gpu in zip(*results, strict=True):
        assert np.linalg.norm(gpu - cpu) < 2e-4 * np.linalg.norm(cpu)
