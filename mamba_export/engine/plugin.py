"""Build the TensorRT plugin library from the sources this package carries, once per content."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mamba_export.engine.backend import cache_folder
from mamba_export.engine.device import find_device
from mamba_export.engine.toolchain import Toolchain, find_toolchain
from mamba_export.errors import EnvironmentProblem, UsageError
from mamba_export.progress import Progress, Tick, silent

DYNAMIC, STATIC = "libmamba_plugins.so", "libmamba_plugins_static.so"
_FACTS = "build.json"
_SOURCES = {".cpp", ".cu", ".cuh", ".h", ".inl", ".txt", ".map", ".cmake"}


@dataclass(frozen=True)
class PluginLibrary:
    """A built plugin library.

    Attributes:
        path: exports ``getCreators``: ``IPluginRegistry.load_library``, trtexec ``--dynamicPlugins``.
        static_path: registers itself when loaded: ``polygraphy --plugins``, trtexec ``--staticPlugins``, ONNX Runtime.
        archs: GPU architectures it has code for, e.g. ``["sm_87"]``.
        tensorrt: version of the headers it was built against.
        cuda: version of the compiler.
        sources: hash of the sources.
        cached: nothing was compiled, the library was there.
    """

    path: str
    static_path: str
    archs: list[str]
    tensorrt: str
    cuda: str
    sources: str
    cached: bool = False


def source_folders() -> tuple[Path, Path]:
    """The folders plugins/tensorrt and kernels/cuda, in a checkout or installed.

    Raises:
        EnvironmentProblem: the installation lacks them.
    """
    root = Path(__file__).resolve().parents[2]
    plugins, kernels = root / "plugins" / "tensorrt", root / "kernels" / "cuda"
    if not plugins.is_dir():
        package = importlib.import_module("mamba_export")
        root = Path(str(package.__file__)).parent
        plugins, kernels = root / "plugins" / "tensorrt", root / "kernels" / "cuda"
    if not (plugins / "CMakeLists.txt").is_file() or not (kernels / "include").is_dir():
        raise EnvironmentProblem("this installation has no plugin sources", "install mamba-export again")
    return plugins, kernels


def source_files() -> dict[str, Path]:
    """Every source of the plugin library: name below the common root → path."""
    plugins, kernels = source_folders()
    files = {}
    for name, folder in (("plugins/tensorrt", plugins), ("kernels/cuda", kernels)):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _SOURCES:
                files[f"{name}/{path.relative_to(folder).as_posix()}"] = path
    return files


def parse_arch(text: str) -> str:
    """``sm_87``, ``87`` or ``8.7`` → ``87``; ``90a`` and ``120f`` keep their letter.

    Raises:
        UsageError: when it is none of these.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)([af]?)", text.strip().lower())
    if found is None:
        raise UsageError(
            f"'{text}' is not a GPU architecture", "for example sm_87 (Orin), sm_110 (Thor), sm_90, sm_120"
        )
    return "".join(found.groups())


def build_plugin(
    archs: Sequence[str] = (),
    *,
    tensorrt_root: str | Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> PluginLibrary:
    """Build the plugin library, or find it in the cache.

    Args:
        archs: GPU architectures (``sm_87``, …); the GPU of this machine when empty.
        tensorrt_root: folder of TensorRT's headers; found when None.
        jobs: compilations at a time; one a processor when None.
        force: build even if it is in the cache.
        progress: gets told what is being done.

    Raises:
        UsageError: an architecture is not one.
        EnvironmentProblem: a tool or the headers are missing, or the build failed.
    """
    numbers = [parse_arch(arch) for arch in dict.fromkeys(archs)]
    if not numbers:
        device = find_device()
        if device is None:
            raise EnvironmentProblem("there is no NVIDIA GPU here", "name the architecture: --arch sm_87")
        numbers = [device.sm]
    toolchain = find_toolchain(tensorrt_root)
    sources = hash_sources()
    folder = cache_folder() / "plugins" / _key(sources, numbers, toolchain)
    if not force and (folder / _FACTS).is_file():
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return PluginLibrary(**{**facts, "cached": True})
    library = PluginLibrary(
        *(str(folder / DYNAMIC), str(folder / STATIC), [f"sm_{n}" for n in numbers]),
        *(toolchain.tensorrt, toolchain.cuda, sources),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as build:
        with progress.stage("build plugin", total=100) as tick:
            _compile(Path(build), numbers, toolchain, sources, jobs, tick)
        _install(Path(build), folder, library)
    return library


def hash_sources() -> str:
    """Hash of all sources of the library, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, path in source_files().items():
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _key(sources: str, archs: Sequence[str], toolchain: Toolchain) -> str:
    version = (toolchain.headers / "NvInferVersion.h").read_bytes()
    facts = f"{sources} {' '.join(archs)} {toolchain.cuda} {os.environ.get('CXX', '')}".encode()
    return hashlib.sha256(facts + version).hexdigest()[:16]


def _compile(
    build: Path, archs: Sequence[str], toolchain: Toolchain, sources: str, jobs: int | None, tick: Tick
) -> None:
    plugins, kernels = source_folders()
    configure = [str(toolchain.cmake), "-S", str(plugins), "-B", str(build), "-G", "Unix Makefiles"]
    configure += [
        f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{arch}-real' for arch in archs)}",
        f"-DTENSORRT_ROOT={toolchain.headers}",
        f"-DMAMBA_KERNELS_DIR={kernels}",
        f"-DMAMBA_PLUGIN_ID={sources}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    _run(configure, tick=None)
    wanted = jobs or int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", 0)) or os.cpu_count() or 1
    _run([str(toolchain.cmake), "--build", str(build), "--parallel", str(wanted)], tick)


def _run(command: Sequence[str], tick: Tick | None) -> None:
    """Run a build command; percentages in its output become progress.

    Raises:
        EnvironmentProblem: it failed; the message holds the end of its output.
    """
    lines, told = [], 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line.rstrip())
            found = re.match(r"\[\s*(\d+)%\]", line)
            if found and tick is not None:
                tick(max(0, int(found[1]) - told))
                told = max(told, int(found[1]))
    if job.returncode:
        errors = [line for line in lines if "rror" in line][:6] or lines[-6:]
        raise EnvironmentProblem("building the plugin failed:\n  " + "\n  ".join(errors))


def _install(build: Path, folder: Path, library: PluginLibrary) -> None:
    """Move the two libraries into the cache; build.json comes last and says that they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DYNAMIC, STATIC):
        shutil.copyfile(build / name, folder / f".{name}")
        os.replace(folder / f".{name}", folder / name)
    partial = folder / f".{_FACTS}"
    partial.write_text(json.dumps(asdict(library), indent=2), encoding="utf-8")
    os.replace(partial, folder / _FACTS)
