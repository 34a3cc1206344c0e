"""The chain of decode_stack on the CPU, device and host code as it stands, a fiber for every thread of a kernel.

Until all threads of a kernel wait for the one before, what the kernels exchange is NaN: a read too early shows. Copies
land when they are waited for. Speed and memory order need a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch

from kernels import decode_stack
from kernels.decode_stack import DecodeStack

from .test_emulated_decode import (
    ASSEMBLY,
    INT4_32_ZEROS,
    INT4_64,
    INT4_128,
    INT8,
    INT8_128,
    SOURCES,
    TOLERANCE,
    copy_shared_headers,
    error,
    mamba1,
    mamba2,
    quantized,
    replace_assembly,
    run_torch,
    weights_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: the decode chain on the CPU, g++ is missing"),
]
START = """
static unsigned char* workspace = nullptr;
static size_t workspace_bytes = 0;
static std::vector<unsigned char> exchange;
static unsigned seed = 0;
template <typename... P, typename... A>
bool start(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t, const A&... arguments) {
  if (shared > max_shared_bytes()) return false;
  exchange.assign(workspace, workspace + workspace_bytes);
  std::memset(workspace, 0xff, workspace_bytes);
  emulation::waiting = grid.x * grid.y * threads;
  emulation::arrived = [] { std::memcpy(workspace, exchange.data(), workspace_bytes); };
  return emulation::run(grid, threads, shared, seed++, [&] { kernel(arguments...); });
}
"""
EARLY = """
#pragma once
#include "common.cuh"
namespace emulation {
inline unsigned waiting = 0;
inline void (*arrived)();
}
namespace mamba {
inline void let_next_start() {}
inline void prefetch_line(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 2) std::abort();
}
inline void wait_for_previous() {
  if (--emulation::waiting == 0) emulation::arrived();
  emulation::wait_until([] { return emulation::waiting == 0; });
}
}
"""
ENTRY = """
static int emulated_blocks = 1;
static size_t emulated_shared = 0;
int mamba::sm_count() { return emulated_blocks; }
size_t mamba::max_shared_bytes() { return emulated_shared; }
extern "C" size_t workspace_of(const mamba_decode_stack_params* p) { return mamba::decode::chain_workspace(*p); }
extern "C" int emulate(const mamba_decode_stack_params* p, int blocks, size_t shared) {
  emulated_blocks = blocks, emulated_shared = shared;
  mamba::decode::workspace = static_cast<unsigned char*>(p->workspace);
  mamba::decode::workspace_bytes = p->workspace_size;
  return mamba::dispatch(p->dtype, [&](auto t) { return mamba::decode::launch_chain<decltype(t)>(*p, nullptr); });
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("chain")
    copy_shared_headers(folder)
    (folder / "early_launch.cuh").write_text(EARLY)
    for header in ("decode_plan.cuh", "decode_integers.cuh"):
        (folder / header).write_text(replace_assembly((SOURCES / header).read_text(), ASSEMBLY))
    for header in SOURCES.glob("decode_chain*.cuh"):
        text = header.read_text()
        assert "asm" not in text
        text = text.replace("extern __shared__ __align__(128) unsigned char smem[];",
                            "unsigned char* smem = emulation::current->block->base;")  # fmt: skip
        (folder / header.name).write_text(text)
    text = (SOURCES / "decode_chain.cu").read_text()
    text, replaced = re.subn(r"template <typename\.\.\. P.*?\n}\n", lambda _: START, text, count=1, flags=re.DOTALL)
    assert replaced == 1
    (folder / "chain.cpp").write_text("#include <algorithm>\n" + text + ENTRY)
    output = folder / "libchain.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-w"]
    command += ["-I", str(folder), "-I", str(folder / "include"), str(folder / "chain.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    library = ctypes.CDLL(str(output))
    library.workspace_of.restype = ctypes.c_size_t
    library.emulate.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return library


# model, dtype, rows, blocks, kB of shared memory, how integers are stored
CASES: dict[str, tuple[Any, ...]] = {
    "mamba1 bf16": (mamba1(192), "bf16", 1, 3, 227),
    "mamba1 several steps": (mamba1(264, n_layer=1, d_inner=1056), "fp16", 1, 5, 227),
    "mamba1 fp16": (
        mamba1(64, n_layer=1, d_inner=192, d_state=64, residual_in_fp32=False, dt_rank=10), "fp16", 1, 2, 99,
    ),
    "mamba1 fp32 rows": (mamba1(72, n_layer=1, d_conv=3, dt_rank=6, tie_embeddings=False), "fp32", 2, 2, 99),
    "mamba1 odd": (mamba1(35, n_layer=1, d_inner=53, d_state=5, dt_rank=3, d_conv=5), "bf16", 2, 3, 99),
    "mamba1 warps without a part": (mamba1(384, n_layer=1, d_inner=64), "fp32", 1, 31, 227),
    "mamba2 bf16": (mamba2(64, ngroups=2), "bf16", 1, 3, 227),
    "mamba2 wide state": (mamba2(128, n_layer=1, d_state=144), "fp16", 1, 7, 99),
    "mamba2 odd": (mamba2(36, n_layer=1, d_state=18, headdim=24, nheads=3), "fp32", 2, 2, 99),
    "mamba1 int8": (mamba1(64), "bf16", 2, 3, 99, INT8),
    "mamba1 int8 several steps": (mamba1(192, n_layer=1, d_inner=1216), "fp16", 1, 5, 99, INT8_128),
    "mamba1 int4": (mamba1(128, n_layer=1), "bf16", 1, 3, 99, INT4_64),
    "mamba2 int4 several steps": (
        mamba2(384, n_layer=1, d_inner=1152, headdim=64, nheads=18), "fp16", 1, 4, 99, INT4_32_ZEROS,
    ),
    "mamba2 int4": (mamba2(128, n_layer=1, d_inner=256), "fp16", 2, 3, 99, INT4_128),
    "mamba1 mixed": (mamba1(128), "bf16", 1, 3, 99, INT4_64, r"0\.mixer\.in_proj|1\.mixer\.out_proj|lm_head"),
    "mamba2 mixed": (mamba2(128, n_layer=2), "fp16", 2, 3, 99, INT4_128, r"1\.mixer\.in_proj|0\.mixer\.out_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case: str, built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, dtype, rows, blocks, shared, *form = CASES[case]

    def launch(op: str, params: ctypes.Structure, like: Any) -> None:
        size = built.workspace_of(ctypes.byref(params))
        workspace = torch.empty(size, dtype=torch.uint8)
        params.workspace, params.workspace_size = workspace.data_ptr(), size
        assert built.emulate(ctypes.byref(params), blocks, shared << 10) == 0

    monkeypatch.setattr(decode_stack, "launch", launch)
    weights = weights_of(spec, dtype)
    mixed: Any = weights
    if form:
        mixed, weights = quantized(weights, *form)
    stack = DecodeStack(spec, mixed, batch=rows)
    prompts = [[5, 7, 2], [9, 60, 3]][:rows]
    logits = [stack.step(torch.tensor(tokens), tactic="chain").clone() for tokens in zip(*prompts, strict=True)]
    for row, prompt in enumerate(prompts):
        exact = run_torch(spec, weights, prompt)
        states = [s[row] for pair in zip(stack.conv_states, stack.ssm_states, strict=True) for s in pair]
        found = [torch.stack([step[row] for step in logits]), *states]
        for ours, wanted in zip(found, exact, strict=True):
            assert error(ours, wanted.reshape(ours.shape)) < TOLERANCE[dtype]
