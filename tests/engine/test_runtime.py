"""The TensorRT runner's own logic, on stand-ins for TensorRT and CUDA: engines run in ONNX Runtime on host memory.

What is tested is everything on this side of TensorRT's interface: which engine, which buffer, which shape, which order.
That a real TensorRT takes it all the same way has been checked by names and signatures alone (test_standin.py).
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export import generate
from mamba_export.bench import run_bench
from mamba_export.bundle import Bundle
from mamba_export.engine import Range
from mamba_export.engine.device import find_device
from mamba_export.errors import BundleError, EnvironmentProblem, UsageError
from mamba_export.extras import available
from mamba_export.runtime import OrtRunner
from mamba_export.runtime.trt import TrtRunner, from_storage, pieces, to_storage
from mamba_export.runtime.trt_cuda import CudaError
from mamba_export.runtime.trt_engine import LoadedEngine
from mamba_export.verification import verify
from mamba_export.verification.perplexity import perplexity
from tests.engine.conftest import CopyBundle, StandIn

Array = np.ndarray[Any, Any]
IDS = np.random.default_rng(5).integers(0, 4096, (3, 70))
MODELS = ["mamba1-tiny", "mamba1-small", "mamba2-small"]
both_ways = pytest.mark.parametrize("single", [True, False], ids=["one engine", "two engines"])


def assert_close(found: Array, wanted: Array, tolerance: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    assert float(np.linalg.norm(found.astype(np.float64) - wanted)) <= tolerance * float(np.linalg.norm(wanted))


@pytest.fixture
def bundle(copy_bundle: CopyBundle) -> Bundle:
    return copy_bundle(dtype="fp32")


@both_ways
def test_prefill_step_and_loop_are_those_of_onnx_runtime(bundle: Bundle, standin: StandIn, single: bool) -> None:
    standin.build(bundle, single_engine=single, seq=Range(1, 16, 32))
    trt, ort = TrtRunner(bundle), OrtRunner(bundle)
    logits, state = trt.prefill(IDS, trt.initial_state(3))  # 70 tokens in three runs of at most 32
    wanted, truth = ort.prefill(IDS, ort.initial_state(3))
    assert_close(logits, wanted)
    again, after = trt.step(IDS[:, :1], state)
    wanted_step, truth_after = ort.step(IDS[:, :1], truth)
    assert_close(again, wanted_step)
    loop, reference = trt.step_loop(state, 3), ort.step_loop(truth, 3)
    assert loop.graphed
    for t in range(5):
        assert_close(loop.step(IDS[:, t : t + 1]), reference.step(IDS[:, t : t + 1]))
    for name, value in loop.state_to_numpy().items():
        assert_close(value, reference.state_to_numpy()[name])
    for found, meant in ((state, truth), (after, truth_after)):  # what was handed out has not changed meanwhile
        for name, value in trt.state_to_numpy(found).items():
            assert_close(value, ort.state_to_numpy(meant)[name])


@both_ways
def test_one_set_of_weights_for_one_engine(bundle: Bundle, standin: StandIn, single: bool) -> None:
    rows = standin.build(bundle, single_engine=single)
    runner = TrtRunner(bundle)
    generate(runner, [1, 2, 3], max_tokens=2)
    assert len(runner._loaded) == len(rows) == (1 if single else 2)


def test_low_memory_devices_get_one_engine(bundle: Bundle, standin: StandIn) -> None:
    assert [row["kind"] for row in standin.build(bundle)] == ["model"]  # the stand-in has 8 GB


def test_a_step_allocates_nothing_and_is_one_launch(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle)
    loop = TrtRunner(bundle).step_loop(TrtRunner(bundle).initial_state(1), 1)
    loop.step(IDS[:1, :1])
    allocations, launches = standin.cuda.stub_allocations(), standin.cuda.stub_launches()
    addresses = {loop.step(IDS[:1, t : t + 1]).ctypes.data for t in range(10)}
    assert standin.cuda.stub_allocations() == allocations
    assert standin.cuda.stub_launches() == launches + 10
    assert len(addresses) == 1
    assert loop.engine_seconds > 0


def test_long_prompts_allocate_nothing_after_the_first_chunks(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle, seq=Range(1, 8, 8))
    runner = TrtRunner(bundle)
    _, state = runner.prefill(IDS[:1, :24], runner.initial_state(1))
    _, state = runner.prefill(IDS[:1, :24], state)  # the caller still holds the one before
    allocations = standin.cuda.stub_allocations()
    for _ in range(3):
        _, state = runner.prefill(IDS[:1, :64], state)
    assert standin.cuda.stub_allocations() == allocations


def test_loops_of_a_size_share_their_buffers_one_after_the_other(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle)
    runner = TrtRunner(bundle)
    start = runner.initial_state(1)
    first, second = runner.step_loop(start, 1), runner.step_loop(start, 1)
    assert first.machine is not second.machine
    wanted = [np.array(first.step(IDS[:1, t : t + 1])) for t in range(3)]
    for t in range(3):
        assert np.array_equal(second.step(IDS[:1, t : t + 1]), wanted[t])
    used = {id(first.machine), id(second.machine)}
    del first, second
    gc.collect()
    third = runner.step_loop(start, 1)
    assert id(third.machine) in used
    assert np.array_equal(third.step(IDS[:1, :1]), wanted[0])  # it starts from its own state, not from the last loop's


@pytest.mark.parametrize("why", ["refused", "not wanted"])
def test_without_cuda_graphs_steps_are_the_same(
    bundle: Bundle, standin: StandIn, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.build(bundle)
    graphed = TrtRunner(bundle).step_loop(TrtRunner(bundle).initial_state(2), 2)
    wanted = [np.array(graphed.step(IDS[:2, t : t + 1])) for t in range(4)]
    if why == "refused":
        monkeypatch.setattr(standin.trt.IExecutionContext, "is_stream_capturable", lambda self, stream: False)
    runner = TrtRunner(bundle, cuda_graphs=why == "refused")
    loop = runner.step_loop(runner.initial_state(2), 2)
    assert not loop.graphed
    for t in range(4):
        assert np.array_equal(loop.step(IDS[:2, t : t + 1]), wanted[t])


def test_a_capture_that_fails_leaves_plain_steps(
    bundle: Bundle, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.build(bundle)
    run = standin.trt.IExecutionContext.execute_async_v3

    def refuses(self: Any, stream_handle: int) -> bool:
        return False if standin.cuda.stub_capturing() else bool(run(self, stream_handle))

    monkeypatch.setattr(standin.trt.IExecutionContext, "execute_async_v3", refuses)
    runner = TrtRunner(bundle)
    loop = runner.step_loop(runner.initial_state(1), 1)
    assert "did not run" in loop.machine.why_not_graphs
    assert_close(loop.step(IDS[:1, :1]), OrtRunner(bundle).step(IDS[:1, :1], OrtRunner(bundle).initial_state(1))[0])


@pytest.mark.parametrize("logits", ["last", "all"])
@both_ways
def test_ragged_rows(copy_bundle: CopyBundle, standin: StandIn, logits: str, single: bool) -> None:
    bundle = copy_bundle(dtype="fp32", ragged=True, logits=logits)
    standin.build(bundle, single_engine=single, seq=Range(1, 8, 16))
    trt, ort = TrtRunner(bundle), OrtRunner(bundle)
    lens = np.array([40, 3, 17], np.int32)
    found, state = trt.prefill(IDS[:, :40], trt.initial_state(3), lens)
    wanted, truth = ort.prefill(IDS[:, :40], ort.initial_state(3), lens)
    if logits == "all":
        found, wanted = (np.stack([a[i, n - 1] for i, n in enumerate(lens)]) for a in (found, wanted))
    assert_close(found, wanted)
    for name, value in trt.state_to_numpy(state).items():
        assert_close(value, ort.state_to_numpy(truth)[name])
    assert_close(trt.step(IDS[:, :1], state)[0], ort.step(IDS[:, :1], truth)[0])
    prompts = [IDS[0, :20].tolist(), IDS[1, :3].tolist()]
    assert [r.token_ids for r in generate(trt, prompts, max_tokens=5).rows] == [
        r.token_ids for r in generate(ort, prompts, max_tokens=5).rows
    ]


@pytest.mark.parametrize("model", MODELS)
def test_greedy_text_is_the_golden_one(
    model: str, copy_bundle: CopyBundle, standin: StandIn, tiny_checkpoint: Path, shared_checkpoint: Any
) -> None:
    folder = tiny_checkpoint if model == tiny_checkpoint.name else shared_checkpoint(model)
    bundle = copy_bundle(ckpt=folder, dtype="fp32")
    standin.build(bundle, seq=Range(1, 16, 24))
    golden = json.loads((folder / "golden_greedy.json").read_text())
    runner = TrtRunner(bundle)
    for case in golden if isinstance(golden, list) else golden["cases"]:
        done = generate(runner, case["prompt_ids"], max_tokens=len(case["greedy_ids"]), ignore_eos=True)
        assert done.token_ids == case["greedy_ids"]


def test_everything_takes_the_runtime(bundle: Bundle, standin: StandIn, tiny_checkpoint: Path) -> None:
    standin.build(bundle, batch=Range(1, 1, 2))
    report = verify(bundle, tiny_checkpoint, runtime="tensorrt")
    assert report.ok
    assert report.runtime == "tensorrt and ONNX Runtime"
    prefixes = ("ONNX Runtime: ", "against ONNX Runtime: ")
    assert {next((p for p in prefixes if e.scenario.startswith(p)), "") for e in report.errors} == {"", *prefixes}
    tokens = np.random.default_rng(0).integers(0, 4096, 260)
    found, wanted = (perplexity(bundle, tokens, window=64, runtime=name) for name in ("tensorrt", "ort"))
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-5)
    measured = run_bench(TrtRunner(bundle), [40], [3], [1, 2], repetitions=1)
    assert [m.test for m in measured] == ["pp40", "tg3"] * 2


def test_engines_are_compared_with_their_graphs_without_a_checkpoint(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle, batch=Range.parse("1"))
    report = verify(bundle, runtime="tensorrt")
    assert report.ok and report.runtime == "tensorrt against ONNX Runtime"
    assert {e.scenario.split()[0] for e in report.errors} == {"prompt", "single"}
    with pytest.raises(UsageError, match="nothing to compare with"):
        verify(bundle)


def test_a_broken_engine_fails_verification(
    bundle: Bundle, standin: StandIn, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.build(bundle)
    run = standin.trt.IExecutionContext._run

    def off(self: Any, bound: dict[str, int], shapes: Any) -> None:
        run(self, bound, shapes)
        self._view("logits", bound["logits"], shapes["logits"])[..., 7] += 20

    monkeypatch.setattr(standin.trt.IExecutionContext, "_run", off)
    report = verify(bundle, tiny_checkpoint, runtime="tensorrt")
    bad = {e.scenario.split(":")[0] for e in report.errors if not e.ok}
    assert not report.ok
    assert "against ONNX Runtime" in bad and "ONNX Runtime" not in bad


def test_float16_and_bfloat16_states_go_there_and_back(copy_bundle: CopyBundle, standin: StandIn) -> None:
    bundle = copy_bundle(dtype="fp16")
    standin.build(bundle)
    runner = TrtRunner(bundle)
    _, state = runner.prefill(IDS, runner.initial_state(3))
    arrays = runner.state_to_numpy(state)
    assert arrays["conv_state_0"].dtype == np.float16 and arrays["ssm_state_0"].dtype == np.float32
    again = runner.state_to_numpy(runner.state_from_numpy(arrays))
    assert all(np.array_equal(again[name], value) for name, value in arrays.items())
    odd = np.array([1.0, -2.5, 1.00390625, 1.01171875, 3.4e38, 0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    back = from_storage(to_storage(odd, np.dtype(np.uint16)))
    wanted = np.array([1.0, -2.5, 1.0, 1.015625, 3.3895314e38, 0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    wanted[4] = np.inf if np.isinf(back[4]) else wanted[4]
    assert np.array_equal(back, wanted, equal_nan=True)


@pytest.mark.parametrize(
    ("length", "least", "most", "wanted"),
    [(70, 1, 32, [32, 32, 6]), (64, 1, 32, [32, 32]), (5, 1, 32, [5]), (33, 8, 32, [25, 8]), (3, 8, 32, [3])],
)
def test_pieces(length: int, least: int, most: int, wanted: list[int]) -> None:
    assert pieces(length, least, most) == wanted


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_there_is_no_gpu(bundle: Bundle, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_export.runtime.trt.find_device", lambda: None)
    with pytest.raises(EnvironmentProblem, match="no NVIDIA GPU"):
        TrtRunner(bundle)


def test_there_is_no_engine(bundle: Bundle, standin: StandIn) -> None:
    with pytest.raises(
        UsageError, match=r"no prefill engine for tensorrt on Stand-in GPU \(sm_87\): it has no engines"
    ):
        TrtRunner(bundle)
    standin.build(bundle)
    bundle.manifest.engines[0]["compute_capabilities"] = ["120"]
    with pytest.raises(UsageError, match="it has engines for tensorrt sm_120") as caught:
        TrtRunner(bundle)
    assert caught.value.hint == f"build it: mamba-export build {bundle.path} --runtime tensorrt"


def test_the_engine_is_of_another_version(bundle: Bundle, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    standin.build(bundle)
    monkeypatch.setattr(standin.trt, "__version__", "12.0.0.1")
    runner = TrtRunner(bundle)
    with pytest.raises(
        EnvironmentProblem, match=r"tensorrt 12\.0\.0\.1 does not load .*\(built by tensorrt 11\.4\.1\.7\)"
    ):
        runner.prefill(IDS, runner.initial_state(3))


def test_the_engine_is_damaged_or_gone(bundle: Bundle, standin: StandIn) -> None:
    (row,) = standin.build(bundle)
    path = bundle.file(row["file"])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="damaged"):
        _ = TrtRunner(bundle).prefill_execution
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        _ = TrtRunner(bundle).prefill_execution


def test_the_engine_is_of_other_graphs(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle)
    bundle.manifest.files["prefill.onnx"]["sha256"] = "0" * 64
    with pytest.raises(BundleError, match=r"built from another prefill\.onnx"):
        TrtRunner(bundle)


def test_the_engine_has_other_states(bundle: Bundle, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = standin.build(bundle)
    runner = TrtRunner(bundle)
    bundle.states[1] = bundle.states[1].__class__(**{**bundle.states[1].__dict__, "dtype": "fp16"})
    with pytest.raises(BundleError, match=r"ssm_state_0 is FLOAT .* the state table says fp16"):
        LoadedEngine(runner.backend, bundle, row)


def test_the_plugin_library_is_found_beside_the_engine_or_named(bundle: Bundle, standin: StandIn) -> None:
    (row,) = standin.build(bundle, plugin=standin.plugin)
    beside = bundle.file("engines/libmamba_plugins.so")
    assert beside.is_file()
    assert "PLUGIN_V3" in row["layers"]
    standin.trt._libraries.clear()
    from mamba_export.engine import backend

    backend._loaded.clear()
    _ = TrtRunner(bundle).prefill_execution
    assert standin.trt._libraries == [str(beside)]
    beside.unlink()
    with pytest.raises(EnvironmentProblem, match=r"needs the plugin library libmamba_plugins\.so .*looked in"):
        _ = TrtRunner(bundle).prefill_execution
    _ = TrtRunner(bundle, plugin=standin.plugin).prefill_execution
    with pytest.raises(UsageError, match="no such plugin library"):
        _ = TrtRunner(bundle, plugin="nowhere.so").prefill_execution


def test_more_rows_than_the_engine_takes(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle, batch=Range(1, 1, 2))
    runner = TrtRunner(bundle)
    assert runner.max_batch == 2
    with pytest.raises(UsageError, match="takes 1 to 2 rows, not 3") as caught:
        runner.prefill(IDS, runner.initial_state(3))
    assert "--batch" in str(caught.value.hint)


def test_the_memory_is_full(bundle: Bundle, standin: StandIn) -> None:
    standin.build(bundle)
    runner = TrtRunner(bundle)
    standin.cuda.stub_limit(ctypes.c_size_t(1000))
    with pytest.raises(CudaError, match="cudaMalloc: out of memory") as caught:
        runner.initial_state(3)
    assert "smaller --profile" in str(caught.value.hint)


# -- the commands, in processes of their own, which load the stand-ins as they would load the real ones -----------


def test_the_commands_run_end_to_end(
    bundle: Bundle, standin: StandIn, cli: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def run(*arguments: Any) -> dict[str, Any]:
        done = cli(*arguments, "--json", env={**standin.env, "XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    built = run("build", bundle.path, "--profile", "1,16,64", "--batch", "1,1,2", "--plugin", standin.plugin)
    assert [engine["compute_capabilities"] for engine in built["engines"]] == [["87"]]
    assert list((tmp_path / "cache" / "mamba-export" / "timing").glob("tensorrt-*-sm87.cache"))
    prompt = ["--prompt", "def read_file(path):", "-n", "12"]
    texts = [run("generate", bundle.path, *prompt, "--runtime", name)["rows"] for name in ("tensorrt", "ort")]
    assert texts[0] == texts[1]
    measured = run("bench", bundle.path, "--runtime", "tensorrt", "-p", "8", "-n", "2", "-r", "1")
    assert [m["test"] for m in measured["measurements"]] == ["pp8", "tg2"]
    readme = Path(__file__).parents[2] / "README.md"
    found = run("perplexity", bundle.path, "--data", readme, "--limit", "1", "--window", "32", "--runtime", "tensorrt")
    assert found["tokens"] == 32
    assert run("verify", bundle.path, "--ckpt", tiny_checkpoint, "--runtime", "tensorrt")["ok"]
    facts = run("inspect", bundle.file("engines/model-tensorrt-sm87.engine"))
    assert facts["intact"] and facts["loaded"]["profiles"] == 2
    assert [b["name"] for b in facts["loaded"]["bindings"]][:2] == ["input_ids", "conv_state_0"]
    assert run("inspect", bundle.path)["engines"][0]["intact"]


def test_what_is_missing_is_said(bundle: Bundle, cli: Callable[..., Any]) -> None:
    """On this machine as it is: without the stand-ins."""
    words = {"tensorrt": 'pip install "mamba-export[tensorrt]"', "tensorrt-rtx": "mamba-export[rtx]"}
    for runtime, hint in words.items():
        module = runtime.replace("-", "_")
        done = cli("generate", bundle.path, "--runtime", runtime, "--tokens", "1,2")
        assert done.returncode == (5 if find_device() is None else 2)
        if find_device() is None:
            assert ("there is no NVIDIA GPU here" if available(module) else hint) in done.stderr
        assert done.stdout == ""


def test_pages_of_inspect(bundle: Bundle, standin: StandIn, cli: Callable[..., Any]) -> None:
    (row,) = standin.build(bundle)
    engine = bundle.file(row["file"])
    shown = cli("inspect", engine, "-v", env=standin.env).stdout
    for text in ("profiles", "prefill 1,1,4 × 1,512,2048", "sm_87", "bindings", "present_ssm_state_5", "layers"):
        assert text in shown
    bare = cli("inspect", engine).stdout
    assert "not loaded" in bare
    engine.write_bytes(b"x")
    assert "the file was changed" in cli("inspect", engine).stdout
    assert "CHANGED" in cli("inspect", bundle.path).stdout
