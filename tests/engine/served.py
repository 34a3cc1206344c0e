"""The C++ program on a stand-in for TensorRT's library: how the library is made, and what computes its engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from mamba_export.bundle import Bundle
from mamba_export.runtime.ort_session import make_session
from tests.engine.standin.pure import make_pure

HERE = Path(__file__).parent / "standin"
STRICT = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]


def compiler() -> str:
    """A C++ compiler; skips where there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("NOT TESTED: the C++ program for Jetson; there is no C++ compiler")
    return found


def header_folders() -> list[Path]:
    """``include`` folders of TENSORRT_ROOT and of other versions that lie beside it."""
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        return []
    roots = [Path(root), *sorted(path for path in Path(root).parent.iterdir() if path != Path(root))]
    return [path / "include" for path in roots if (path / "include" / "NvInferRuntime.h").is_file()]


def need_headers(include: Path | None) -> Path:
    """``include``; skips where the program can't be built."""
    if include is None:
        pytest.skip("NOT TESTED: the C++ program for Jetson; set TENSORRT_ROOT to a folder with TensorRT's headers")
    if shutil.which("cmake") is None or _cuda_headers() is None:
        pytest.skip("NOT TESTED: the C++ program for Jetson; it needs CMake and CUDA's headers")
    return include


def _cuda_headers() -> Path | None:
    places = (Path("/usr/local/cuda/include"), Path("/usr/include"))
    return next((path for path in places if (path / "cuda_runtime_api.h").is_file()), None)


def compile_nvinfer(folder: Path, include: Path, libraries: Path) -> Path:
    """libnvinfer.so in ``folder``, against one version's headers and the stand-in for CUDA."""
    (folder / "pure.inc").write_text(make_pure(include))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-deprecated-declarations", f"-I{folder}"]
    system = ["-isystem", include, "-isystem", _cuda_headers(), "-Wl,-soname,libnvinfer.so", libraries / "libcudart.so"]
    target = folder / "libnvinfer.so"
    subprocess.run([compiler(), *flags, "-o", target, HERE / "nvinfer.cpp", *system], check=True)
    return target


TYPES = {"tensor(float)": (0, np.float32), "tensor(float16)": (1, np.float16)}
TYPES |= {"tensor(int32)": (3, np.int32), "tensor(int64)": (8, np.int64), "tensor(int8)": (2, np.int8)}


class Served:
    """The engines of a bundle, for a program that runs on the stand-in for TensorRT's library."""

    def __init__(self, bundle: Bundle, folder: Path, single: bool, longest: int = 16, plugin: bool = False) -> None:
        """Write "engines" into ``folder``; each is the list of a graph's tensors."""
        graphs = {"model": "prefill.onnx"} if single else {"prefill": "prefill.onnx", "step": "step.onnx"}
        self.sessions = [make_session(bundle, graph, threads=1) for graph in graphs.values()]
        self.runs: list[tuple[int, int]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, session) in enumerate(zip(graphs, self.sessions, strict=True)):
            lengths = {"model": [longest, 1], "prefill": [longest], "step": [1]}[name]
            lines = ["standin", f"id {number}", *(["plugin"] if plugin else [])]
            for is_input, values in ((1, session.get_inputs()), (0, session.get_outputs())):
                for value in values:
                    shape = [size if isinstance(size, int) else -1 for size in value.shape]
                    dims, code = " ".join(map(str, shape)), TYPES[value.type][0]
                    lines.append(f"tensor {value.name} {is_input} {code} {len(shape)} {dims}")
                    for most in lengths if is_input else []:
                        rows = [
                            [1 if i == 0 else limit if size < 0 else size for i, size in enumerate(shape)]
                            for limit in (1, most, most)
                        ]
                        lines.append("profile " + " ".join(str(size) for row in rows for size in row))
            (folder / f"{name}.engine").write_text("\n".join(lines) + "\n")

    def serve(self, source: BinaryIO, sink: BinaryIO) -> None:
        """Answer runs until the program ends."""
        while number := source.read(8):
            session = self.sessions[int.from_bytes(number, "little")]
            feed = {}
            for value in session.get_inputs():
                ndim = int.from_bytes(source.read(8), "little")
                shape = np.frombuffer(source.read(8 * ndim), np.int64)
                dtype = np.dtype(TYPES[value.type][1])
                feed[value.name] = np.frombuffer(source.read(int(shape.prod()) * dtype.itemsize), dtype).reshape(shape)
            self.runs.append((int.from_bytes(number, "little"), feed["input_ids"].shape[1]))
            for array in session.run(None, feed):
                sink.write(array.tobytes())
            sink.flush()

    def run(self, program: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
        """Run the program with this process computing its engines."""
        (in_reader, in_writer), (out_reader, out_writer) = os.pipe(), os.pipe()
        env = {**os.environ, "STANDIN_TO": str(in_writer), "STANDIN_FROM": str(out_reader)}
        command = [program, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=env,
            pass_fds=(in_writer, out_reader),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(in_writer)
        os.close(out_reader)
        with os.fdopen(in_reader, "rb") as source, os.fdopen(out_writer, "wb") as sink:
            server = threading.Thread(target=self.serve, args=(source, sink))
            server.start()
            stdout, stderr = process.communicate(timeout=120)
            server.join()
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
