"""The plugin library's host code against every set of TensorRT headers there is, without warnings; plugin_host over it.

The kernels are left out: stubs of their C interface stand in, and nothing here needs a GPU or compiles CUDA. Headers
are those of TENSORRT_ROOT and of the folders in MAMBA_TENSORRT_ROOTS (separated like PATH): one a version of TensorRT.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mamba_export.engine.toolchain import find_headers, find_nvcc, tensorrt_version
from mamba_export.errors import EnvironmentProblem, UsageError

ROOT = Path(__file__).resolve().parents[2]
PLUGINS, KERNELS = ROOT / "plugins" / "tensorrt", ROOT / "kernels" / "cuda" / "include"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", '-DMAMBA_PLUGIN_ID="test"']
WORKERS = 2


def roots() -> list[Path]:
    named = [*os.environ.get("MAMBA_TENSORRT_ROOTS", "").split(os.pathsep), os.environ.get("TENSORRT_ROOT", "")]
    found: dict[tuple[int, int], Path] = {}
    for root in filter(None, named):
        headers = find_headers(root)
        found.setdefault(tensorrt_version(headers), headers)
    return [found[version] for version in sorted(found)]


def version(headers: Path) -> str:
    return "TensorRT {}.{}".format(*tensorrt_version(headers))


HEADERS = roots()
every_version = pytest.mark.parametrize("headers", HEADERS, ids=version)
pytestmark = pytest.mark.skipif(
    not HEADERS, reason="NOT TESTED: the plugin library's host code; set TENSORRT_ROOT (and MAMBA_TENSORRT_ROOTS)"
)


@pytest.fixture(scope="module")
def cuda() -> Path:
    """CUDA's folder, with include/ and lib64/."""
    try:
        home = find_nvcc().resolve().parents[1]
    except (EnvironmentProblem, UsageError) as problem:
        pytest.skip(f"NOT TESTED: the plugin library's host code; {problem}")
    for candidate in (home, Path("/usr/local/cuda")):
        if (candidate / "include" / "cuda_runtime_api.h").is_file():
            return candidate
    pytest.skip(f"NOT TESTED: the plugin library's host code; no CUDA headers in {home}")


def compile_all(compiler: str, sources: Sequence[Path], headers: Path, cuda: Path, out: Path) -> list[Path]:
    """Objects of the sources. Fails with the compiler's words."""
    out.mkdir()
    include = [f"-I{PLUGINS / 'src'}", f"-I{KERNELS}", "-isystem", str(headers), "-isystem", str(cuda / "include")]

    def one(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        done = subprocess.run(
            [compiler, *FLAGS, *include, "-c", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{source.name}:\n{done.stderr}"
        return target

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, sources))


def library_sources() -> list[Path]:
    """All of the library but its other entry point."""
    sources = [*PLUGINS.glob("src/*.cpp"), *PLUGINS.glob("src/ops/*.cpp")]
    return sorted(path for path in sources if path.stem != "self_register")


def stubs(folder: Path) -> Path:
    """A source that defines every function of the kernels' C interface: it does nothing and says that it failed."""
    lines = []
    for header in sorted(KERNELS.glob("mamba/*.h")):
        lines.append(f'#include "mamba/{header.name}"')
    for header in sorted(KERNELS.glob("mamba/*.h")):
        for found in re.findall(r"MAMBA_API ([\w* ]+?)\s*(mamba_\w+)\(([^)]*)\)", header.read_text(encoding="utf-8")):
            kind, name, parameters = (re.sub(r"\s+", " ", part) for part in found)
            unnamed = re.sub(r"(\*|\s)\s*\w+(?=,|$)", r"\1", parameters)
            value = {"size_t": "0", "int": "0" if name.endswith("_tactics") else "6"}.get(kind, '"a stub"')
            lines.append(f'extern "C" {kind} {name}({unnamed}) {{ return {value}; }}')
    path = folder / "stubs.cpp"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@every_version
def test_plugin_host(headers: Path, cuda: Path, tmp_path: Path) -> None:
    """Creators, fields, types, shapes, formats, serialization, clones and refusals, as TensorRT would walk them."""
    compiler = os.environ.get("CXX") or "g++"
    objects = compile_all(compiler, [*library_sources(), stubs(tmp_path)], headers, cuda, tmp_path / "library")
    library, host = tmp_path / "libmamba_plugins.so", tmp_path / "plugin_host"
    link = ["-L", str(cuda / "lib64"), "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
    script = f"-Wl,--version-script={PLUGINS / 'exports.map'}"
    subprocess.run([compiler, "-shared", "-o", library, *objects, script, "-Wl,--no-undefined", *link], check=True)
    (program,) = compile_all(compiler, [PLUGINS / "tests" / "host.cpp"], headers, cuda, tmp_path / "host")
    subprocess.run([compiler, "-o", host, program, "-ldl"], check=True)
    done = subprocess.run([host, library], capture_output=True, text=True, check=False)
    print(version(headers), done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr


@every_version
def test_the_other_sources_compile(headers: Path, cuda: Path, tmp_path: Path) -> None:
    """The self-registering library's entry, and the programs that need a GPU to run."""
    tests = [path for path in sorted(PLUGINS.glob("tests/*.cpp")) if path.stem != "host"]
    sources = [PLUGINS / "src" / "self_register.cpp", *tests]
    assert len(compile_all(os.environ.get("CXX") or "g++", sources, headers, cuda, tmp_path / "objects")) == len(
        sources
    )


@every_version
def test_host_code_compiles_for_aarch64(headers: Path, cuda: Path, tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("NOT TESTED: cross-compilation; apt-get install g++-aarch64-linux-gnu")
    sources = [*library_sources(), PLUGINS / "src" / "self_register.cpp"]
    for path in compile_all(compiler, sources, headers, cuda, tmp_path / "objects"):
        assert path.read_bytes()[18:20] == b"\xb7\x00", "not a file for aarch64"
