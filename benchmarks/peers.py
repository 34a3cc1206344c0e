"""Set up the peers, each in a virtual environment of its own under a cache folder.

    python benchmarks/peers.py [--cache FOLDER] [llamacpp] [openvino]

llama-cpp-python is compiled from its source package (about ten minutes on one core).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
REQUIREMENTS = {
    "llamacpp": ["--no-binary", "llama-cpp-python", LLAMA],
    "openvino": ["optimum-intel[openvino]", "transformers<=5.3"],
}
PROBES = {"llamacpp": "import llama_cpp", "openvino": "import optimum.intel"}


def default_cache() -> Path:
    """Where environments, models and bundles of the benchmarks are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mamba-export" / "benchmarks"


def python_of(name: str, cache: Path, install: bool = True) -> str | None:
    """The interpreter of a peer's environment, made now if need be; None when it can't be had."""
    folder = cache / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        if not install:
            return None
        print(f"setting up {name} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        done = subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=False)
        if done.returncode or subprocess.run([python, "-c", PROBES[name]], check=False).returncode:
            print(f"{name} does not install here", file=sys.stderr)
            return None
        (folder / "ready").touch()
    return str(python)


def llama_source(cache: Path) -> Path:
    """llama.cpp's source out of the source package, for its converter."""
    sources = cache / "llama-source"
    found = list(sources.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    if not found:
        sources.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "-d", sources, LLAMA], check=True)
        with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
            archive.extractall(sources, filter="data")
        found = list(sources.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    return found[0].parent


def gguf_of(model: Path, cache: Path) -> Path:
    """The float32 GGUF of a Hugging Face folder, made by llama.cpp's converter."""
    out = model.parent / f"{model.name}-f32.gguf"
    if not out.exists():
        source = llama_source(cache)
        env = {**os.environ, "PYTHONPATH": str(source / "gguf-py")}
        command = [sys.executable, source / "convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", out]
        subprocess.run(command, env=env, check=True, capture_output=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", choices=[*REQUIREMENTS, []], help="all when left out")
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    for name in options.peers or REQUIREMENTS:
        print(name, python_of(name, options.cache) or "not available")


if __name__ == "__main__":
    main()
