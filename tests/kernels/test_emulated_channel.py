"""selective_scan's channel, device and host code as it stands, on the CPU, a fiber for every thread of a block.

Only what is PTX is replaced (``fibers/``). Several blocks run at once, in random orders, since pieces in turn wait for
each other; shared memory begins as NaN. ThreadSanitizer, to which a fiber is a thread, must see every hand-over ordered
by a barrier or by release and acquire. Speed needs a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_emulated_decode import HERE, SOURCES, copy_shared_headers, replace_assembly

ASSEMBLY = {
    "ld.acquire.gpu": "v = __atomic_load_n(p, __ATOMIC_ACQUIRE)",
    "st.release.gpu": "__atomic_store_n(p, v, __ATOMIC_RELEASE)",
    # The chain's, which does not run.
    **dict.fromkeys(("cp.async.", "barrier.cluster", "mapa.", "st.async."), "std::abort()"),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: the scan on the CPU, g++ is missing"),
]


def copy_scan(folder: Path, kernel: str, *parts: str) -> None:
    """The sources of selective_scan, the two launches of ``kernel`` (a pattern) emulated, and folders of this one."""
    copy_shared_headers(folder)
    for part in parts:
        for file in (HERE / part).iterdir():
            shutil.copy(file, folder)
    launches = 0
    for file in SOURCES.glob("selective_scan*"):
        text = replace_assembly(file.read_text(), ASSEMBLY)
        text = re.sub(r"extern __shared__ .* (\w+) (\w+)\[\];",
                      r"auto* \2 = reinterpret_cast<\1*>(emulation::current->block->base);", text)  # fmt: skip
        text = re.sub(
            r"__shared__ int (\w+);", r"int& \1 = *reinterpret_cast<int*>(emulation::current->block->fixed);", text
        )
        text, count = re.subn(rf"({kernel})<<<(.*?)>>>\(", r"launch_emulated(\1, \2, ", text)
        launches += count
        (folder / file.name).write_text(text)
    assert launches == 2


def build(folder: Path, *options: str) -> Path:
    copy_scan(folder, r"\w+<T, kVec>", "emulation_scan", "emulation_channel")
    command = ["g++", "-std=c++20", "-fno-strict-aliasing", "-w", *options, "-I", str(folder)]
    command += ["-I", str(folder / "include"), str(folder / "channel.cpp"), "-o", str(folder / "channel")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
    return folder / "channel"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("channel"), "-O2")


@pytest.mark.parametrize("rows", ["whole", "in turn", "side by side", "random"])
def test_agrees_with_the_recurrence(rows: str, program: Path) -> None:
    done = subprocess.run([str(program), rows], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr


def test_every_hand_over_is_ordered(tmp_path: Path) -> None:
    program = build(tmp_path, "-O1", "-g", "-fsanitize=thread")
    done = subprocess.run([str(program), "few"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr[-4000:]
