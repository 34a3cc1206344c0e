"""selective_scan's chain, the source as it stands, on the CPU: a thread for every thread of a block.

Warps of a block hand states on and wait for each other, so that this also tests the protocol: it must not hang, and
ThreadSanitizer must see every hand-over ordered by a barrier. Only what is PTX is replaced. Speed needs a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
HERE = Path(__file__).resolve().parent
BODIES = {
    "common.cuh": {
        "ex2": "return std::exp2(x);",
        "rcp": "return 1.0f / x;",
        "thread_again": "return threadIdx.x;",
        "smem_address": "return uint32_t(static_cast<const char*>(p) - emulated_shared(0));",
        "cp_async": "if (valid) std::memcpy(dst, src, kBytes);",
        "cp_async_commit": "",
        "cp_async_wait": "",
        "mbarrier_init": "emulated_init(bar, arrivals);",
        "fence_mbarrier_init": "",
        "mbarrier_arrive": "emulated_arrive(bar);",
        "mbarrier_expect": "emulated_change(bar, 1, bytes / 8);",
        "mbarrier_wait": "emulated_wait(bar, parity);",
    },
    "selective_scan_chain_copy.cuh": {
        "cp_async_at": "std::memcpy(emulated_shared(dst), src, kBytes);",
        "mbarrier_arrive_copies": "mbarrier_arrive(bar);",
    },
    "tensor_copy.cuh": {
        "fence_async_proxy": "",
        "elected": "return emulation::lane == 0;",
        "prefetch_map": "",
        "load_box": "emulated_load_box(dst, map, 0, token, column / map.columns, batch, bar);",
        "store_box": "emulated_store_box(map, src, 0, token, column / map.columns, batch);",
        "load_box_of_part": "emulated_load_box(dst, map, column, token, part, batch, bar);",
        "store_box_of_part": "emulated_store_box(map, src, column, token, part, batch);",
        "bulk_commit": "",
        "bulk_wait_read": "",
    },
    "selective_scan_chain_linked.cuh": {
        "cluster_arrive": "emulation::whole_cluster->arrive_and_wait();",
        "cluster_wait": "",
        "address_in": "return smem_address(p) + (rank - emulation::rank) * emulation::kShared;",
        "send_states": "if (sends) emulated_send(to, h, bar);",
    },
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: the chain on the CPU, g++ is missing"),
]


def with_bodies(source: str, bodies: dict[str, str]) -> str:
    """``source`` with the bodies of some functions replaced; no PTX may be left."""
    for name, body in bodies.items():
        head = re.search(rf"__device__ __forceinline__ \w+ {name}\([^{{;]*\) {{", source)
        assert head, name
        end, depth = head.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        source = f"{source[: head.end()]} {body} {source[end - 1 :]}"
    assert "asm" not in re.sub(r"//.*", "", source)
    return source


def build(folder: Path, *options: str) -> Path:
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    for part in ("emulation", "emulation_scan", "emulation_chain"):
        for file in (HERE / part).iterdir():
            shutil.copy(file, sources)
    for name, bodies in BODIES.items():
        (sources / name).write_text(with_bodies((sources / name).read_text(), bodies))
    of_block = "char* shared = emulation::memory[emulation::rank];"
    for kernel in (sources / "selective_scan_chain.cuh", sources / "selective_scan_chain_lots.cuh"):
        kernel.write_text(re.sub(r"extern __shared__ .* char shared\[\];", of_block, kernel.read_text()))
    command = ["g++", "-std=c++20", "-DEMULATION_SHUFFLES=true", *options, "-pthread", "-fno-strict-aliasing"]
    command += ["-I", str(sources), "-I", str(sources / "include")]
    command += [str(sources / "chain.cpp"), "-o", str(folder / "chain")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "chain"


def test_agrees_with_the_recurrence(tmp_path: Path) -> None:
    done = subprocess.run([str(build(tmp_path, "-O2"))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr


def test_every_hand_over_is_ordered(tmp_path: Path) -> None:
    program = build(tmp_path, "-O1", "-g", "-fsanitize=thread")
    done = subprocess.run([str(program), "few"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr[-4000:]
