"""The memory-bound CUDA kernels, device and host code as it stands, run on the CPU: a thread is a thread.

Only what is PTX is replaced (``emulation/``). Speed and memory order need a GPU; indices, tails, tactics and the
mathematics do not.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import causal_conv1d, library, nvrtc, nvrtc_ops, selective_state_update, ssd_state_update
from tests.ops.oracle import oracle, relative
from tests.ops.samples import Kind, Sample, examples, ragged_samples, samples

OPS = {"conv": "causal_conv1d", "scan": "selective_state_update", "ssd": "ssd_state_update"}
FUNCTIONS = {
    "conv": causal_conv1d.causal_conv1d,
    "scan": selective_state_update.selective_state_update,
    "ssd": ssd_state_update.ssd_state_update,
}
LIMIT = {torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="NOT TESTED: kernels on the CPU, g++ is missing"
)
pytestmark = [needs_compiler, pytest.mark.slow]


def build(folder: Path) -> ctypes.CDLL:
    """One library of the three ops for the CPU."""
    sources = folder / "cuda"
    shutil.copytree(nvrtc.SOURCES, sources)
    for file in Path(__file__).with_name("emulation").iterdir():
        shutil.copy(file, sources)
    common = (sources / "common.cuh").read_text()
    common = common[: common.index("// ---- asynchronous copies")] + "}  // namespace mamba\n"
    common = re.sub(r'asm\("ex2.*\n', "y = std::exp2(x);\n", common)
    common = re.sub(r'asm\("rcp.*\n', "y = 1.0f / x;\n", common)
    assert "asm" not in common
    (sources / "common.cuh").write_text(common)
    (sources / "device.cpp").write_text('#include "common.cuh"\nint mamba::sm_count() { return 1; }\n')
    for name, shuffles in ((OPS["conv"], 0), (OPS["scan"], 1), (OPS["ssd"], 1)):
        text = f"#define EMULATION_SHUFFLES {shuffles}\n" + (sources / f"{name}.cu").read_text()
        (sources / f"{name}.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing", "-I", str(sources)]
    files = [str(sources / f"{name}.cpp") for name in (*OPS.values(), "device")]
    output = folder / "libemulated.so"
    done = subprocess.run(
        [*command, "-I", str(sources / "include"), *files, "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The wrappers launch in the emulation and take tensors of the CPU."""
    built = build(tmp_path_factory.mktemp("emulated"))

    def launch(op: str, params: ctypes.Structure, like: Any) -> None:
        status = getattr(built, f"mamba_{op}")(ctypes.byref(params), None)
        if status:
            raise library.KernelError(f"{op}: status {status}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.Arguments, "_check", lambda *_: None)
        for module in (causal_conv1d, selective_state_update, ssd_state_update):
            patch.setattr(module, "launch", launch)
        yield built


def tactics_of(built: ctypes.CDLL, kind: Kind, call: Any) -> list[int]:
    """What the op's own list says of the call."""
    found: list[int] = []

    def ask(op: str, params: ctypes.Structure, like: Any) -> None:
        out = (ctypes.c_int32 * 64)()
        found.extend(out[: getattr(built, f"mamba_{op}_tactics")(ctypes.byref(params), out, len(out))])

    with pytest.MonkeyPatch.context() as patch:
        module = {"conv": causal_conv1d, "scan": selective_state_update, "ssd": ssd_state_update}[kind]
        patch.setattr(module, "launch", ask)
        call(-1)
    return found


@pytest.mark.parametrize("length", [1, 9, 95, 97, 340, 360, 1490, 1510, 2100])
@pytest.mark.parametrize(("width", "dtype"), [(4, torch.bfloat16), (4, torch.float32), (3, torch.float16)])
def test_nvrtc_chooses_the_same_convolution(width: int, dtype: torch.dtype, length: int, emulated: ctypes.CDLL) -> None:
    x, weight = torch.zeros(1, length, 128).to(dtype), torch.zeros(128, width).to(dtype)
    call = partial(causal_conv1d.causal_conv1d, x, weight)
    chosen = tactics_of(emulated, "conv", lambda tactic: call(tactic=tactic))[0]
    assert nvrtc_launch(call, -1) == nvrtc_launch(call, chosen), chosen


@pytest.mark.parametrize("batch", [1, 2, 8, 22, 43, 64])
def test_nvrtc_chooses_the_same_rows(batch: int, emulated: ctypes.CDLL) -> None:
    token = random_token("scan", (batch, 16, 1, 1, 16), torch.bfloat16, torch.float32, 1)
    call = partial(selective_state_update.selective_state_update, *token.step_arguments())
    chosen = tactics_of(emulated, "scan", lambda tactic: call(tactic=tactic))[0]
    assert nvrtc_launch(call, -1) == nvrtc_launch(call, chosen)


def nvrtc_launch(call: Any, tactic: int) -> tuple[Any, ...]:
    """The kernel and the grid that stand in for the library's, on one multiprocessor like the emulation."""
    found: list[nvrtc_ops.Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (causal_conv1d, selective_state_update):
            patch.setattr(module, "launch", lambda op, params, _: found.append(nvrtc_ops.OPS[op](params, 1)))
        call(tactic=tactic)
    return found[0].instance, found[0].grid


def check(kind: Kind, sample: Sample, built: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every tactic, out of place into poisoned outputs and in place."""
    y_exact, exact, y_size, size = oracle(sample)
    y_size += 1e-4 if dtype == torch.float16 else 0.0  # float16 is coarse below that
    size += 1e-4 if sample.state.dtype == torch.float16 else 0.0
    like = next(iter(sample.time.values()))
    arguments = sample.step_arguments() if kind != "conv" else sample.arguments()

    def call(tactic: int, **outputs: Any) -> tuple[Any, Any]:
        return FUNCTIONS[kind](*arguments, tactic=tactic, **outputs)  # type: ignore[no-any-return, operator]

    tactics = tactics_of(built, kind, call)
    assert tactics
    for tactic in (-1, *tactics):
        out, final = torch.full_like(like, float("nan")), torch.full_like(sample.state, float("nan"))
        y, present = call(tactic, out=out, final_state=final)
        assert relative(y.float(), y_exact, y_size) < LIMIT[dtype], tactic
        assert relative(present.float(), exact, size) < LIMIT[sample.state.dtype], tactic
        state = sample.state.clone()
        in_place = FUNCTIONS[kind](
            *(state if a is sample.state else a for a in arguments), tactic=tactic, final_state=state
        )  # type: ignore[operator]
        assert torch.equal(in_place[1], present) and torch.equal(in_place[0], y), tactic


@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp16", "bf16"])
@given(data=st.data())
@examples(15)
def test_conv(dtype: torch.dtype, emulated: ctypes.CDLL, data: st.DataObject) -> None:
    sample = data.draw(samples("conv", max_length=80)).to(dtype)
    wide = data.draw(st.sampled_from([1, 8, 40]))  # channels that fill vectors, and more than one block
    sample = Sample(
        "conv",
        {"x": sample.time["x"].repeat(1, 1, wide)},
        {
            "weight": sample.fixed["weight"].repeat(wide, 1).to(dtype),
            "bias": sample.fixed["bias"].repeat(wide).to(dtype),
        },
        sample.state.repeat(1, wide, 1).to(dtype),
        sample.options,
    )
    check("conv", sample, emulated, dtype)


@given(data=st.data())
@examples(20)
def test_conv_of_ragged_rows(emulated: ctypes.CDLL, data: st.DataObject) -> None:
    sample, lens = data.draw(ragged_samples("conv"))
    y, present = causal_conv1d.causal_conv1d(*sample.arguments(lens))
    for row, length in enumerate(lens.tolist()):
        assert not y[row, length:].any()
        if length == 0:
            assert torch.equal(present[row], sample.state[row])
        else:
            y_exact, exact, y_size, size = oracle(sample.row(row, length))
            assert relative(y[row : row + 1, :length], y_exact, y_size) < LIMIT[torch.float32]
            assert relative(present[row : row + 1], exact, size) < LIMIT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@given(data=st.data())
@examples(12)
def test_conv_of_four_taps(dtype: torch.dtype, emulated: ctypes.CDLL, data: st.DataObject) -> None:
    """What models have, and the tactics that are there for it alone: ragged rows with poisoned padding, inputs far from
    zero, the state in place."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 90))
    channels, scale = data.draw(st.sampled_from([8, 136])), data.draw(st.sampled_from([1.0, 30.0]))
    lens = torch.tensor(data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch)), dtype=torch.int32)
    x = (scale * torch.randn(batch, length, channels, generator=generator)).to(dtype)
    x[torch.arange(length) >= lens[:, None]] = float("nan")
    weight = torch.randn(channels, 4, generator=generator)
    fixed = {"weight": weight, "bias": torch.randn(channels, generator=generator)}
    wide = data.draw(st.booleans())
    fixed = {name: value if wide else value.to(dtype) for name, value in fixed.items()}
    state = torch.randn(batch, channels, 3, generator=generator).to(dtype)
    options = {"activation": data.draw(st.booleans())}
    tactics = tactics_of(
        emulated, "conv", lambda _: causal_conv1d.causal_conv1d(x, fixed["weight"], fixed["bias"], state, lens)
    )
    assert {10006, 10008} < set(tactics)
    for tactic in tactics:
        y, present = torch.full_like(x, float("nan")), state.clone()
        causal_conv1d.causal_conv1d(
            x, *fixed.values(), present, lens, options["activation"], out=y, final_state=present, tactic=tactic
        )
        for row, n in enumerate(lens.tolist()):
            assert not y[row, n:].any(), tactic
            one = Sample("conv", {"x": x[row : row + 1, :n]}, fixed, state[row : row + 1], options)
            y_exact, exact, y_size, size = oracle(one)
            assert relative(y[row : row + 1, :n].float(), y_exact, y_size + 1e-4) < LIMIT[dtype], tactic
            assert relative(present[row : row + 1].float(), exact, size + 1e-4) == 0, tactic


def test_conv_tactics_that_are_not_there(emulated: ctypes.CDLL) -> None:
    x, weight = torch.zeros(1, 9, 8).bfloat16(), torch.zeros(8, 4).bfloat16()
    for other, taps, tactic in ((x, weight, 0), (x, weight, 10004), (x, weight, 10007), (x, weight, 20006),
                                (x.float(), weight.float(), 10006), (x, weight[:, :3].contiguous(), 10006),
                                (x[:, :, :7].contiguous(), weight[:7], 10006), (x[:, :1], weight, 10008)):  # fmt: skip
        with pytest.raises(library.KernelError):
            causal_conv1d.causal_conv1d(other, taps, tactic=tactic)


def random_token(kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, state: torch.dtype, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    batch, heads, headdim, groups, d_state = shape
    inner = (heads,) if kind == "scan" else (heads, headdim)
    x_name, dt_name, bias_name = ("u", "delta", "delta_bias") if kind == "scan" else ("x", "dt", "dt_bias")
    time = {x_name: normal(batch, 1, *inner), dt_name: normal(batch, 1, heads) - 2}
    time |= {"B": normal(batch, 1, groups, d_state), "C": normal(batch, 1, groups, d_state)}
    if seed % 2:
        time["z"] = normal(batch, 1, *inner)
    A = -torch.rand(heads, d_state, generator=generator) if kind == "scan" else -torch.rand(heads, generator=generator)
    D = normal(*inner) if seed % 3 else normal(heads)
    options = {"softplus": seed % 5 > 0, "reverse": False, "dt_min": 0.0, "dt_max": 3.0}
    bias = normal(heads)
    if not options["softplus"]:
        time[dt_name], bias = time[dt_name].abs(), bias.abs()
    fixed = {"A": A * 8, "D": D, bias_name: bias}
    time = {name: value.to(dtype) for name, value in time.items()}
    return Sample(kind, time, fixed, normal(batch, *inner, d_state).to(state), options)


SHAPES: dict[str, list[tuple[int, ...]]] = {  # batch, channels or heads, headdim, groups, d_state
    "scan": [
        (1, 40, 1, 1, 16),
        (7, 33, 1, 1, 16),
        (5, 6, 1, 2, 64),
        (3, 20, 1, 2, 20),
        (6, 9, 1, 1, 8),
        (2, 5, 1, 1, 128),
    ],
    "ssd": [(1, 3, 64, 1, 128), (2, 2, 33, 2, 64), (3, 1, 7, 1, 20), (1, 2, 80, 1, 16), (1, 1, 20, 1, 256)],
}


@pytest.mark.parametrize(
    "types", [(0, 0), (2, 0), (1, 1), (2, 2), (1, 0)], ids=lambda t: "-".join(["fp32", "fp16", "bf16"][i] for i in t)
)
@pytest.mark.parametrize("kind", ["scan", "ssd"])
def test_updates(kind: Kind, types: tuple[int, int], emulated: ctypes.CDLL) -> None:
    dtype, state = (list(LIMIT)[i] for i in types)
    for seed, shape in enumerate(SHAPES[kind]):
        check(kind, random_token(kind, shape, dtype, state, seed), emulated, dtype)
