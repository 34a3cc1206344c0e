"""The two-pass SSD kernels for Hopper, device code as it stands, run on the CPU: a thread is a thread.

Only what is PTX is replaced (``hopper/``), matrix instructions with their descriptors and swizzles included. Speed and
memory order need a GPU; indices, barriers, tails and the mathematics do not.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import nvrtc

HERE = Path(__file__).parent
LIMIT = {torch.float32: 2e-5, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
POINTERS = "x dt B C z y A D dt_bias initial_state final_state seq_lens"
SIZES = (
    "batch seqlen nheads ngroups d_state dt_softplus d_per_channel width halves "
    "heads_per_block chunks first rest together"
)
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: kernels on the CPU, g++ is missing"),
    pytest.mark.slow,
]


class Call(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in POINTERS.split()] + [(n, ctypes.c_int32) for n in SIZES.split()]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, sources = tmp_path_factory.mktemp("two_pass"), Path(nvrtc.SOURCES)

    def take(name: str, *changes: tuple[str, str]) -> None:
        text = (sources / name).read_text()
        for pattern, to in changes:
            text, count = re.subn(pattern, to, text)
            assert count, (name, pattern)
        assert "asm" not in text, name
        (folder / name).write_text(text)

    def body(name: str) -> tuple[str, str]:
        return rf"__device__ __forceinline__ void {name}\([^{{]*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}\n", ""

    for file in (*(HERE / "emulation").glob("cuda_*16.h"), *(HERE / "hopper").iterdir()):
        shutil.copy(file, folder)
    take("common.cuh", (r"(?s)// ---- asynchronous copies.*", "}\n"), (r'asm\("ex2.*\n', "y = std::exp2(x);\n"),
         (r'asm\("rcp.*\n', "y = 1.0f / x;\n"))  # fmt: skip
    take("ssd_chunk.cuh", (r'asm\("lg2.*\n', "y = std::log2(x);\n"))
    mma = '#pragma once\n#include "cuda.h"\n#include "common.cuh"\n#include "hopper.h"\n'
    take("ssd_mma.cuh", (r"(?s).*?(// A tile of rows of kCols.*)", mma + r"namespace mamba {\nnamespace ssd {\n\1"))
    take("ssd_two_pass_plan.cuh")
    for name in ("ssd_wgmma.cuh", "early_launch.cuh"):
        (folder / name).write_text('#include "ssd_mma.cuh"\n')
    take("ssd_two_pass.cuh", (r"(?s)template <bool kPadded>\n[^\n]*void tensor_load.*?(?=// Zeros in rows)", ""),
         (r"template <int kPending>\n__device__ __forceinline__ void bulk_wait\(\) \{[^}]*\}\n", ""),
         *map(body, ("store_shared_16", "load_shared_16", "bulk_load", "bulk_store")))  # fmt: skip
    memory = (r"extern __shared__ __align__\(1024\) uint8_t memory\[\];", "uint8_t* memory = emu::smem;")
    take("ssd_two_pass_stages.cuh")
    take("ssd_two_pass_pieces.cuh")
    take("ssd_two_pass_states.cuh", memory)
    take("ssd_two_pass_rows.cuh")
    take("ssd_two_pass_outputs.cuh", memory)
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing", f"-I{folder}"]
    output = folder / "two_pass.so"
    command += [f"-I{sources / 'include'}", str(folder / "two_pass.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(output))


def number(more: str, what: str, default: int) -> int:
    found = re.search(rf"(\d+) {what}", more)
    return int(found[1]) if found else default


def in_halves(dtype: torch.dtype, more: str) -> bool:
    """Whether a head is two of the kernel's; of 72 and 80 columns there are kernels for whole ones."""
    width, d_state = number(more, "columns", 64), number(more, "states", 128)
    return width > 64 and not (width <= 80 and 64 < d_state <= 128 and dtype != torch.float32)


def make(batch: int, seqlen: int, nheads: int, ngroups: int, dtype: torch.dtype, more: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seqlen + nheads)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    d_state, width = number(more, "states", 128), number(more, "columns", 64)
    nheads = nheads // 2 if in_halves(dtype, more) else nheads
    inputs: dict[str, Any] = {
        "x": normal(batch, seqlen, nheads, width).to(dtype), "dt": normal(batch, seqlen, nheads).to(dtype),
        "B": normal(batch, seqlen, ngroups, d_state).to(dtype), "C": normal(batch, seqlen, ngroups, d_state).to(dtype),
        "A": -(1 + 15 * torch.rand(nheads, generator=generator)), "D": normal(nheads),
        "dt_bias": normal(nheads) - 4, "initial_state": normal(batch, nheads, width, d_state),
        "z": None, "seq_lens": None,
    }  # fmt: skip
    if "gate" in more:
        inputs |= {"z": normal(batch, seqlen, nheads, width).to(dtype), "D": normal(nheads, width)}
    if "ragged" in more:
        inputs["seq_lens"] = torch.tensor([seqlen, 0, 131, 77, 300, 256][:batch], dtype=torch.int32)
    if "slow" in more:  # the state of the first tokens is still seen by the last
        inputs["A"] = inputs["A"] / 100
    if "extreme" in more:
        spread = torch.rand(batch, seqlen, nheads, generator=generator)
        inputs |= {"dt": (10 ** (spread * 9.7 - 8)).to(dtype), "dt_bias": None}
        inputs["A"] = -(10 ** torch.linspace(-4, 3, nheads))
    return inputs


def reference(i: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, in float64."""
    x, dt, A, B, C = (i[name].double() for name in ("x", "dt", "A", "B", "C"))
    batch, seqlen, nheads = dt.shape
    B, C = (t.repeat_interleave(nheads // t.shape[2], 2) for t in (B, C))
    if i["dt_bias"] is not None:
        dt = torch.nn.functional.softplus(dt + i["dt_bias"].double())
    state, y = i["initial_state"].double(), torch.zeros_like(x)
    lens = torch.full((batch,), seqlen) if i["seq_lens"] is None else i["seq_lens"]
    for t in range(seqlen):
        new = (
            torch.exp(dt[:, t] * A)[..., None, None] * state
            + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        )
        state = torch.where((lens > t)[:, None, None, None], new, state)
        y[:, t] = (state * C[:, t, :, None]).sum(-1)
    y = y + x * (i["D"].double() if i["D"].dim() == 2 else i["D"].double()[:, None])
    y = y if i["z"] is None else y * torch.nn.functional.silu(i["z"].double())
    return y * (torch.arange(seqlen) < lens[:, None])[..., None, None], state


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    value = float((out.double() - expected).norm() / expected.norm())
    return value if value == value else float("inf")  # NaN never passes


@pytest.mark.parametrize(
    ("shape", "dtype", "warpgroups", "heads", "chunks", "more"),
    [
        ((1, 300, 3, 1), torch.bfloat16, 2, 3, 3, ""),
        ((1, 300, 3, 1), torch.bfloat16, 1, 2, 2, "gate"),  # two pairs of launches
        ((1, 128, 12, 1), torch.bfloat16, 2, 12, 1, ""),  # stages come round three times
        ((1, 700, 2, 1), torch.bfloat16, 2, 1, 6, ""),
        ((4, 150, 4, 2), torch.float16, 2, 2, 2, "gate ragged"),
        ((4, 150, 5, 1), torch.bfloat16, 2, 2, 2, "gate ragged"),  # heads 0 and 3, 1 and 4, 2
        ((1, 140, 8, 1), torch.float16, 1, 8, 2, "extreme"),
        ((3, 150, 2, 1), torch.float32, 1, 2, 1, "gate ragged"),
        ((1, 140, 8, 1), torch.float32, 1, 4, 1, "extreme"),
        ((2, 150, 4, 1), torch.bfloat16, 2, 3, 2, "128 columns"),
        ((1, 150, 4, 2), torch.float32, 1, 2, 2, "128 columns gate"),
        ((2, 150, 6, 1), torch.bfloat16, 2, 3, 2, "80 columns"),
        ((3, 150, 4, 1), torch.float16, 1, 4, 1, "80 columns gate ragged"),  # in two pairs of launches
        ((1, 400, 3, 1), torch.bfloat16, 2, 3, 4, "72 columns 72 states gate"),
        ((1, 600, 5, 1), torch.bfloat16, 1, 5, 5, "80 columns"),  # stages come round
        ((2, 150, 6, 1), torch.bfloat16, 1, 3, 2, "80 columns 64 states"),
        ((1, 150, 4, 2), torch.float32, 1, 2, 2, "80 columns gate"),
        ((1, 300, 5, 1), torch.bfloat16, 2, 5, 3, "256 states"),
        ((3, 150, 4, 2), torch.float16, 1, 2, 1, "256 states gate ragged"),
        ((1, 140, 8, 1), torch.float32, 1, 8, 2, "extreme"),  # stages come round four times
        ((2, 150, 6, 2), torch.bfloat16, 2, 3, 2, "32 columns 16 states"),
        ((3, 150, 4, 2), torch.bfloat16, 2, 2, 1, "40 columns 96 states gate ragged"),
        ((1, 150, 4, 2), torch.float16, 2, 2, 1, "72 columns 136 states gate"),
        ((3, 150, 4, 2), torch.float32, 1, 2, 1, "24 columns 72 states gate ragged"),
    ],
    ids=str,
)
def test_matches_float64(
    library: ctypes.CDLL, shape: tuple[int, int, int, int], dtype: torch.dtype, warpgroups: int, heads: int,
    chunks: int, more: str,
) -> None:  # fmt: skip
    check(library, shape, dtype, warpgroups, heads, chunks, more, (0, 1, 1))


@pytest.mark.parametrize(
    ("shape", "dtype", "warpgroups", "heads", "cut", "more"),
    [
        ((1, 500, 3, 1), torch.bfloat16, 1, 3, (2, 2, 1), ""),
        ((1, 700, 3, 1), torch.bfloat16, 2, 2, (4, 2, 2), "slow gate"),  # a block has the ends of two rows
        ((1, 700, 5, 1), torch.float16, 2, 5, (1, 2, 3), "slow"),  # three pieces and one more, in any blocks
        ((1, 700, 3, 1), torch.bfloat16, 1, 3, (2, 2, 1), "slow"),
        ((1, 520, 2, 1), torch.bfloat16, 2, 2, (2, 1, 3), "in place"),
        ((6, 400, 2, 2), torch.bfloat16, 2, 1, (2, 2, 3), "slow gate ragged"),
        ((6, 400, 3, 1), torch.float16, 1, 3, (1, 1, 2), "slow ragged"),
        ((1, 400, 8, 1), torch.bfloat16, 2, 4, (1, 2, 1), "extreme"),
        ((1, 400, 5, 1), torch.bfloat16, 2, 3, (7, 0, 1), "slow gate"),  # equal runs of chunks, over the ends of rows
        ((6, 400, 3, 1), torch.float16, 1, 3, (5, 0, 1), "slow ragged in place"),
        ((1, 300, 8, 2), torch.float32, 1, 4, (4, 0, 1), "slow"),
        (
            (1, 400, 7, 1),
            torch.float32,
            1,
            7,
            (1, 1, 2),
            "slow 64 states",
        ),  # a head has up to four states, of two stages
        ((1, 400, 8, 1), torch.float32, 1, 8, (1, 2, 1), "extreme 64 states"),
        ((3, 400, 3, 1), torch.bfloat16, 1, 3, (2, 1, 1), "slow ragged 64 states"),
        ((6, 400, 2, 1), torch.float32, 1, 2, (2, 1, 1), "slow gate ragged"),
        ((1, 500, 2, 1), torch.float32, 1, 2, (1, 1, 2), "slow"),
        ((1, 400, 8, 1), torch.float32, 1, 4, (2, 2, 1), "extreme"),
        ((1, 400, 7, 1), torch.float32, 1, 7, (1, 1, 2), "slow"),
        ((6, 400, 3, 1), torch.bfloat16, 1, 3, (1, 1, 2), "48 columns 16 states slow ragged"),
        ((1, 400, 5, 1), torch.bfloat16, 2, 3, (7, 0, 1), "32 columns 200 states slow gate"),
        ((1, 400, 8, 2), torch.float32, 1, 4, (1, 1, 2), "88 columns 40 states slow"),
        ((6, 400, 2, 1), torch.bfloat16, 2, 1, (2, 2, 3), "80 columns slow gate ragged"),
        ((1, 400, 6, 1), torch.float32, 1, 6, (1, 1, 2), "80 columns slow"),
        ((1, 400, 5, 1), torch.bfloat16, 2, 5, (7, 0, 1), "80 columns slow gate"),
        ((6, 400, 3, 1), torch.float16, 1, 3, (1, 1, 2), "80 columns slow ragged in place"),
        ((1, 500, 6, 1), torch.bfloat16, 2, 3, (1, 1, 2), "80 columns 256 states slow"),
        ((6, 400, 3, 1), torch.float16, 1, 3, (1, 1, 2), "256 states slow ragged in place"),
        ((1, 400, 5, 1), torch.bfloat16, 2, 5, (7, 0, 1), "256 states slow gate"),
    ],
    ids=str,
)
def test_rows_cut_in_time(
    library: ctypes.CDLL, shape: tuple[int, int, int, int], dtype: torch.dtype, warpgroups: int, heads: int,
    cut: tuple[int, int, int], more: str,
) -> None:  # fmt: skip
    check(library, shape, dtype, warpgroups, heads, -(-shape[1] // 128), more, cut)


def check(
    library: ctypes.CDLL, shape: tuple[int, int, int, int], dtype: torch.dtype, warpgroups: int, heads: int,
    chunks: int, more: str, cut: tuple[int, int, int],
) -> None:  # fmt: skip
    inputs = make(*shape, dtype, more)
    expected, final = reference(inputs)
    if inputs["seq_lens"] is not None:
        for row, length in enumerate(inputs["seq_lens"].tolist()):
            for name in ("x", "dt", "B", "C"):
                inputs[name][row, length:] = float("nan")
    inputs["y"] = torch.full_like(inputs["x"], float("nan"))
    inputs["final_state"] = torch.full_like(inputs["initial_state"], float("nan"))
    if "in place" in more:
        inputs["final_state"] = inputs["initial_state"]
    call = Call(*(None if inputs[n] is None else inputs[n].data_ptr() for n in POINTERS.split()))
    call.batch, call.seqlen, call.nheads, call.ngroups = shape
    call.d_state = inputs["B"].shape[-1]
    call.dt_softplus, call.d_per_channel = int(inputs["dt_bias"] is not None), int(inputs["D"].dim() == 2)
    call.width = number(more, "columns", 64)
    call.halves = int(in_halves(dtype, more))
    call.heads_per_block, call.chunks = heads, chunks
    call.first, call.rest, call.together = cut
    library.two_pass(ctypes.byref(call), {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype], warpgroups)
    assert error(inputs["y"], expected) < LIMIT[dtype]
    assert error(inputs["final_state"], final) < LIMIT[dtype]
