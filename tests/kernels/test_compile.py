"""The CUDA sources compile without a warning: by nvcc for every architecture, and at run time by NVRTC."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import nvrtc, nvrtc_ops
from mamba_export.engine.backend import cache_folder
from mamba_export.errors import MambaExportError

SOURCES = Path(nvrtc.SOURCES)
ARCHITECTURES = (87, 90, 110, 120)
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="NOT TESTED: compiling the kernels, nvcc is missing"
)
needs_nvrtc = pytest.mark.skipif(
    not nvrtc.available(),
    reason="NOT TESTED: compiling at run time, libnvrtc is missing (pip install nvidia-cuda-nvrtc)",
)


def compiled_once(source: Path, arch: str, folder: Path) -> None:
    """Compiles one file, unless these sources were compiled before with this compiler: then the cache says so."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((version, FLAGS, arch, source.name)).encode())
    for path in [source, *sorted(p for kind in ("cuh", "inl", "h") for p in SOURCES.rglob(f"*.{kind}"))]:
        digest.update(path.read_bytes())
    stamp = cache_folder() / "compiled" / digest.hexdigest()
    if stamp.is_file():
        return
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    includes = [f"-I{SOURCES / 'include'}", f"-I{SOURCES}"]
    command = ["nvcc", *FLAGS, *includes, target, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} for sm_{arch}:\n{done.stderr[-3000:]}"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc(architecture: int, tmp_path: Path) -> None:
    """Two minutes of two cores in all: an architecture compiles every fourth file, and all of them the small ones."""
    files = sorted(SOURCES.glob("*.cu"))
    share = files[ARCHITECTURES.index(architecture) :: len(ARCHITECTURES)]
    small = [SOURCES / f"{name}.cu" for name in ("common", "ssd_state_update")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = []
        for source in {*share, *small}:
            arch = "90a" if source.stem.endswith("_sm90a") else str(architecture)
            jobs.append(pool.submit(compiled_once, source, arch, tmp_path))
        for job in jobs:
            job.result()


class Params:
    """Parameters of any op: 16-byte aligned pointers, everything else as given."""

    def __init__(self, **values: int) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> int:
        return 0


SHAPES = {
    "causal_conv1d": [
        Params(batch=2, seqlen=100, channels=96, width=4, tactic=-1, dtype=2, weight_dtype=2),
        Params(batch=2, seqlen=1, channels=33, width=3, tactic=-1, dtype=0, weight_dtype=0),
        Params(batch=2, seqlen=100, channels=96, width=4, tactic=10006, dtype=2, weight_dtype=2),
        Params(batch=2, seqlen=100, channels=96, width=4, tactic=10008, dtype=1, weight_dtype=0),
    ],
    "selective_state_update": [
        Params(batch=64, dim=1536, ngroups=1, d_state=16, tactic=-1, dtype=2, state_dtype=0),
        Params(batch=1, dim=40, ngroups=2, d_state=20, tactic=-1, dtype=1, state_dtype=1),
    ],
    "ssd_state_update": [
        Params(batch=64, nheads=24, headdim=64, ngroups=1, d_state=128, tactic=-1, dtype=2, state_dtype=0),
        Params(batch=1, nheads=3, headdim=33, ngroups=1, d_state=20, tactic=-1, dtype=0, state_dtype=2),
    ],
}


@needs_nvrtc
@pytest.mark.parametrize("op", nvrtc_ops.OPS)
def test_nvrtc(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for params in SHAPES[op]:
        what = nvrtc_ops.OPS[op](params, 132)
        assert all(n >= 1 for n in what.grid)
        for architecture in ARCHITECTURES:
            code, name = nvrtc.compile_kernel(what.header, what.instance, f"sm_{architecture}")
            assert code[:4] == b"\x7fELF" and name.encode() in code
    kept = sorted((tmp_path / "mamba-export" / "nvrtc").iterdir())
    assert len(kept) == len(SHAPES[op]) * len(ARCHITECTURES)
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("the cache was not used"))
    assert nvrtc.compile_kernel(what.header, what.instance, f"sm_{architecture}") == (code, name)


@needs_nvrtc
def test_nvrtc_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MambaExportError, match="no_such_kernel"):
        nvrtc.compile_kernel("causal_conv1d_kernel.cuh", "mamba::conv::no_such_kernel<4>", "sm_90")
    assert not (tmp_path / "mamba-export").exists()
