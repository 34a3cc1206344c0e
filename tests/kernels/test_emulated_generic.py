"""selective_scan's generic tactic, device and host code as it stands, on the CPU, a fiber for every thread of a block.

And the selector's choices for an H200, which need no kernel.

Only what is PTX is replaced (``fibers/``); shared memory begins as NaN. Speed needs a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kernels import library, selective_scan
from tests.gpu.test_selective_scan import error, reference

from .test_emulated_channel import copy_scan

LIMIT = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: the scan on the CPU, g++ is missing"),
]


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The wrapper launches in the emulation and takes tensors of the CPU."""
    folder = tmp_path_factory.mktemp("generic")
    copy_scan(folder, r"generic_kernel<T, kLanes, \w+>", "emulation_generic")
    output = folder / "generic.so"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing", "-w", "-I", str(folder)]
    command += ["-I", str(folder / "include"), str(folder / "generic.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    library_of_cpu = ctypes.CDLL(str(output))
    library_of_cpu.mamba_selective_scan_workspace.restype = ctypes.c_size_t

    def launch(op: str, params: ctypes.Structure, like: Any) -> None:
        size = library_of_cpu.mamba_selective_scan_workspace(ctypes.byref(params))
        workspace = torch.full((size // 4 + 1,), float("nan"))
        params.workspace, params.workspace_size = workspace.data_ptr(), size
        status = library_of_cpu.mamba_selective_scan(ctypes.byref(params), None)
        if status:
            raise library.KernelError(f"{op}: status {status}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "_require", lambda *_: None)
        patch.setattr(selective_scan, "launch", launch)
        patch.setattr(library, "load", lambda: library_of_cpu)
        yield library_of_cpu


def make(shape: tuple[int, ...], dtype: torch.dtype, more: str) -> dict[str, Any]:
    batch, seqlen, dim, d_state, groups = shape
    generator = torch.Generator().manual_seed(seqlen + dim)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return {
        "u": normal(batch, seqlen, dim).to(dtype), "delta": (0.5 * normal(batch, seqlen, dim) - 3).to(dtype),
        "A": -torch.rand(dim, d_state, generator=generator) * (0.5 if "slow" in more else 16),
        "B": normal(batch, seqlen, groups, d_state).to(dtype), "C": normal(batch, seqlen, groups, d_state).to(dtype),
        "D": normal(dim), "delta_bias": 0.3 * normal(dim), "state": normal(batch, dim, d_state),
        "z": None if "bare" in more else normal(batch, seqlen, dim).to(dtype),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "pieces", "more"),
    [
        ((1, 70, 40, 5, 1), torch.bfloat16, 1, ""),  # a lane a channel, states that are no power of two
        ((2, 50, 300, 8, 1), torch.float32, 1, "ragged"),  # two blocks, the last with few channels
        ((2, 100, 66, 16, 2), torch.float16, 1, "reverse bare"),
        ((1, 33, 40, 64, 1), torch.bfloat16, 1, ""),
        ((1, 20, 9, 256, 1), torch.float32, 1, ""),
        ((1, 70, 40, 5, 1), torch.bfloat16, 3, ""),
        ((3, 90, 40, 8, 1), torch.float32, 4, "ragged slow"),  # pieces that hold nothing of a short row
        ((2, 100, 66, 32, 2), torch.float16, 5, "reverse bare slow"),
        ((2, 100, 20, 64, 1), torch.bfloat16, 7, "slow in place ragged"),
        ((1, 50, 9, 128, 1), torch.float32, 2, "in place"),
        ((1, 100, 40, 12, 1), torch.float32, -1, ""),  # the selector's choice: in pieces
    ],
    ids=str,
)
def test_agrees_with_the_recurrence(shape: tuple[int, ...], dtype: torch.dtype, pieces: int, more: str) -> None:
    inputs = make(shape, dtype, more)
    lens = torch.tensor([shape[1], 17, 1][: shape[0]], dtype=torch.int32) if "ragged" in more else None
    expected, final = reference(**inputs, seq_lens=lens, reverse="reverse" in more)
    for row, end in enumerate([] if lens is None else lens.tolist()):
        for name in ("u", "delta", "B", "C"):
            inputs[name][row, end:] = float("nan")
    out = torch.full(inputs["u"].shape, float("nan"), dtype=dtype)
    state = inputs["state"] if "in place" in more else torch.full_like(inputs["state"], float("nan"))
    tactic = -1 if pieces < 0 else selective_scan.generic_tactic(pieces)
    y, h = selective_scan.selective_scan(
        **inputs, seq_lens=lens, reverse="reverse" in more, out=out, final_state=state, tactic=tactic
    )
    assert error(y, expected) < LIMIT[dtype]
    assert error(h, final) < 1e-5


GENERIC, CHANNEL, TWO_LANES, FOUR_LANES, EIGHT_LANES, LINKED = range(6)  # struct Tactic in selective_scan.cuh


@pytest.mark.parametrize(
    ("shape", "d_state", "kernel", "groups"),  # shape: batch, channels, tokens; groups: of a block of the chain
    [
        ((1, 768, 2048), 8, FOUR_LANES, 1),
        ((1, 1536, 2048), 8, LINKED, 3),
        ((1, 3072, 1024), 8, FOUR_LANES, 3),
        ((8, 2048, 512), 8, FOUR_LANES, 4),
        ((1, 5120, 1024), 8, FOUR_LANES, 5),
        ((1, 64, 8192), 8, FOUR_LANES, 1),
        ((1, 768, 2048), 32, EIGHT_LANES, 2),
        ((1, 1536, 2048), 32, FOUR_LANES, 2),
        ((1, 3072, 1024), 32, FOUR_LANES, 3),
        ((1, 5120, 1024), 32, FOUR_LANES, 5),
        ((1, 256, 16384), 32, GENERIC, 0),
        ((1, 768, 2048), 64, EIGHT_LANES, 2),
        ((1, 1536, 2048), 64, EIGHT_LANES, 3),
        ((1, 2048, 2048), 64, FOUR_LANES, 2),
        ((1, 5120, 1024), 64, EIGHT_LANES, 5),
        ((1, 64, 8192), 64, GENERIC, 0),
        ((1, 1536, 2048), 128, EIGHT_LANES, 3),
        ((1, 2048, 2048), 128, EIGHT_LANES, 4),
        ((1, 256, 16384), 128, GENERIC, 0),
        ((1, 768, 1024), 256, EIGHT_LANES, 2),
        ((4, 1536, 256), 256, EIGHT_LANES, 4),
        ((1, 256, 2048), 256, GENERIC, 0),
        ((1, 192, 197), 16, EIGHT_LANES, 1),
        ((1, 768, 256), 16, FOUR_LANES, 1),
        ((1, 512, 2048), 16, LINKED, 1),
        ((1, 1024, 2048), 16, FOUR_LANES, 1),
        ((1, 1536, 128), 16, LINKED, 3),
        ((1, 1536, 200), 16, LINKED, 3),
        ((1, 1536, 512), 16, LINKED, 3),
        ((1, 1536, 700), 16, LINKED, 3),
        ((1, 1536, 32768), 16, LINKED, 3),
        ((1, 2048, 2048), 16, FOUR_LANES, 2),
        ((1, 2560, 300), 16, FOUR_LANES, 3),
        ((1, 256, 65536), 16, CHANNEL, 0),
        ((2, 1536, 2048), 16, FOUR_LANES, 3),
        ((1, 3584, 1024), 16, TWO_LANES, 2),
        ((1, 4096, 2048), 16, TWO_LANES, 2),
        ((1, 7168, 2048), 16, FOUR_LANES, 7),
        ((1, 8192, 2048), 16, TWO_LANES, 4),
        ((1, 256, 16384), 16, CHANNEL, 0),
        ((1, 64, 16384), 16, CHANNEL, 0),
        ((1, 512, 32768), 16, LINKED, 1),
        ((1, 768, 65536), 16, CHANNEL, 0),
        ((1, 1536, 131072), 16, CHANNEL, 0),
        ((1, 4096, 2048), 32, FOUR_LANES, 4),
        ((1, 7168, 1024), 8, FOUR_LANES, 7),
        ((2, 5120, 2048), 16, TWO_LANES, 5),
        ((4, 1536, 2048), 16, TWO_LANES, 3),
        ((3, 5120, 512), 16, FOUR_LANES, 5),
        ((64, 768, 128), 16, CHANNEL, 0),
        ((6, 1536, 256), 16, TWO_LANES, 5),
        ((16, 1536, 128), 16, TWO_LANES, 4),
    ],
    ids=str,
)
def test_the_selector_takes_what_was_fastest_on_an_h200(
    built: ctypes.CDLL, shape: tuple[int, int, int], d_state: int, kernel: int, groups: int
) -> None:
    found = tactics_of(built, shape, d_state, multiprocessors=132)
    assert len(found) > 1
    assert (found[0] & 15, found[0] >> 4 & 255) == (kernel, groups)


def test_blocks_are_linked_only_where_there_are_clusters(built: ctypes.CDLL) -> None:
    assert LINKED in {tactic & 15 for tactic in tactics_of(built, (1, 1536, 2048), 16, multiprocessors=16)}
    before_hopper = tactics_of(built, (1, 1536, 2048), 16, multiprocessors=16, major=8)
    assert FOUR_LANES in {tactic & 15 for tactic in before_hopper}
    assert LINKED not in {tactic & 15 for tactic in before_hopper}


def tactics_of(
    built: ctypes.CDLL, shape: tuple[int, int, int], d_state: int, multiprocessors: int, major: int = 9
) -> list[int]:
    """What the selector lists on such a device; shape: batch, channels, tokens."""
    batch, dim, seqlen = shape
    u, B = torch.empty(batch, seqlen, dim, dtype=torch.bfloat16), torch.empty(batch, seqlen, 1, d_state).bfloat16()
    built.set_device(multiprocessors, major)
    try:
        return selective_scan.selective_scan_tactics(u, u, torch.empty(dim, d_state), B, B, u)
    finally:
        built.set_device(2, 9)
