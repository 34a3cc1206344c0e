"""Builds the plugin library with its hosts, runs them on this machine's GPU and writes RESULTS.md.

    python benchmarks/plugin_host.py --tensorrt-root DIR [--sources PEER] [--build DIR] [--arch 90] [-o FILE]

Needs CUDA's compiler, CMake, TensorRT's headers and a GPU; with --sources (the peer's source packages) also torch.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLUGINS = HERE.parent / "plugins" / "tensorrt"


def run(command: list[str], **options: Any) -> tuple[int, str, float]:
    """Exit code, output and seconds of a command."""
    start = time.perf_counter()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False, **options
    )
    return done.returncode, done.stdout, time.perf_counter() - start


def build(options: argparse.Namespace) -> None:
    configure = ["cmake", "-S", str(PLUGINS), "-B", str(options.build), "-DMAMBA_PLUGIN_TESTS=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={options.arch}-real", f"-DTENSORRT_ROOT={options.tensorrt_root}"]
    configure += ["-DMAMBA_WARNINGS_AS_ERRORS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (configure, ["cmake", "--build", str(options.build), "--parallel", str(os.cpu_count())]):
        code, output, seconds = run(command)
        if code:
            sys.exit("\n".join(output.splitlines()[-40:]))
        print(f"{' '.join(command[:2])}: {seconds:.0f} s", flush=True)


def host_section(build_folder: Path) -> str:
    """Worst errors of every op and type, and what the checks said."""
    library = str(build_folder / "libmamba_plugins.so")
    quick, text, _ = run([str(build_folder / "plugin_host"), library])
    lines = [f"Without a GPU (`plugin_host`): {text.splitlines()[-1]}."]
    print(text[-2000:], flush=True)
    code, text, seconds = run([str(build_folder / "plugin_gpu_host"), library])
    print("\n".join(line for line in text.splitlines() if not line.startswith("  Mamba"))[-6000:], flush=True)
    lines.append(f"\nOn the GPU (`plugin_gpu_host`, {seconds:.0f} s): {text.splitlines()[-1]}.")
    worst: dict[tuple[str, str], list[float]] = {}
    for op, types, y, state in re.findall(r"^  (Mamba\w+) (\S+) .* y (\S+), state (\S+)$", text, re.MULTILINE):
        entry = worst.setdefault((op, types), [0.0, 0.0, 0])
        entry[:] = [max(entry[0], float(y)), max(entry[1], float(state)), entry[2] + 1]
    lines += ["", "| op | types | cases | worst y | worst state |", "|---|---|---|---|---|"]
    lines += [f"| {op} | {types} | {n} | {y:.1e} | {h:.1e} |" for (op, types), (y, h, n) in worst.items()]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"]
        checked, text, seconds = run([*command, str(build_folder / "plugin_gpu_host"), library, "--quick"])
        found = re.findall(r"ERROR SUMMARY: .*", text)
        lines.append(
            f"\ncompute-sanitizer memcheck, small shapes ({seconds:.0f} s): {found[-1] if found else text[-300:]}."
        )
        print("\n".join(line for line in text.splitlines() if not line.startswith("  Mamba"))[-3000:], flush=True)
        code = code or checked
    if code or quick:
        lines.append("\n**FAILED**")
    return "\n".join(lines)


def overhead_section(build_folder: Path) -> str:
    code, text, _ = run([str(build_folder / "plugin_gpu_overhead"), str(build_folder / "libmamba_plugins.so")])
    print(text[-3000:], flush=True)
    lines = [
        "Microseconds a call: the processor's time, and the GPU's in bursts of 200 in a stream and in a graph. The bare"
    ]
    lines += ["kernel call is timed before and after; the overhead is over the mean of the two.", ""]
    lines += [
        "| case | bare call | enqueue call | overhead | bare, stream | enqueue, stream | bare, graph | enqueue, graph |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for line in text.splitlines():
        row = json.loads(line)
        bare = [(a + b) / 2 for a, b in zip(row["bare"], row["bare_again"], strict=True)]
        call, stream, graph = row["enqueue"]
        lines.append(
            f"| {row['case']} | {bare[0]:.2f} | {call:.2f} | **{call - bare[0]:+.2f}** | {bare[1]:.2f} | {stream:.2f} "
            f"| {bare[2]:.2f} | {graph:.2f} |"
        )
    return "\n".join(lines) + ("\n\n**FAILED**" if code else "")


def what_chain_runs() -> str:
    """The paragraph of plugin_chain.py that says what is measured."""
    text = ast.get_docstring(ast.parse((HERE / "plugin_chain.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[2]


def chain_section(build_folder: Path, sources: Path) -> str:
    command = [sys.executable, str(HERE / "plugin_chain.py"), str(build_folder / "libmamba_plugins.so")]
    command += [str(build_folder / "libplugin_chain.so"), "--sources", str(sources)]
    lines = ["| model | projections | chain, ms/token | plugins alone | nodes | peer's generate, ms/token | ratio |"]
    lines += ["|---|---|---|---|---|---|---|"]
    notes = []
    for width, depth in ((768, 24), (2560, 64)):
        code, text, _ = run([*command, "--d-model", str(width), "--n-layer", str(depth)])
        print(text[-3000:], flush=True)
        if code:
            return f"**FAILED**\n\n```\n{text[-1500:]}\n```"
        r = json.loads(text.splitlines()[-1])
        for key, name in (("cublas", "cuBLAS"), ("gemv", "plain kernel")):
            ms, (same, of) = r[key]["ms"], r[key]["same_tokens"]
            lines.append(
                f"| {r['model']} | {name} | {ms:.3f} | {r['plugins_alone_ms']:.3f} | {r['nodes']} | {r['peer_ms']:.3f} "
                f"| **{r['peer_ms'] / ms:.2f}** |"
            )
            notes.append(
                f"- {r['model']}, {name}: logits within {r[key]['logits_relative']:.1e} of the peer's prefill of the "
                f"same tokens, the same likeliest token {same} times of {of}."
            )
    return "\n".join([*lines, "", *notes])


def machine() -> str:
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    nvcc = run(["nvcc", "--version"])[1]
    release = re.search(r"release (\S+),", nvcc)
    return f"{said}; CUDA {release[1] if release else '?'}; {datetime.date.today()}"


def headers_version(root: Path) -> str:
    path = next(root.rglob("NvInferVersion.h"))
    found = re.findall(r"#define (?:NV_TENSORRT|TRT)_(?:MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)", path.read_text())
    return ".".join(found[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensorrt-root", type=Path, required=True)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--build", type=Path, default=Path("build/plugin-tests"))
    parser.add_argument("--arch", default="90")
    parser.add_argument("-o", "--output", type=Path, default=PLUGINS / "tests" / "RESULTS.md")
    options = parser.parse_args()
    build(options)
    text = "# The plugin library on a GPU\n\nWritten by `benchmarks/plugin_host.py`.\n\n"
    text += f"{machine()}; built against TensorRT {headers_version(options.tensorrt_root)} headers.\n\n"
    text += "Errors are relative to a reference in double (norms), over all tactics, ragged and whole.\n\n"
    sections = {"Every op against the reference": host_section(options.build)}
    options.output.write_text(text + "".join(f"## {title}\n\n{body}\n\n" for title, body in sections.items()))
    sections["Enqueue over the bare kernel"] = overhead_section(options.build)
    if options.sources:
        sections["The step of a whole model as a CUDA graph"] = (
            f"{what_chain_runs()}\n\n{chain_section(options.build, options.sources)}"
        )
    body = "".join(f"## {title}\n\n{body}\n\n" for title, body in sections.items())
    options.output.write_text((text + body).rstrip() + "\n")
    if "**FAILED**" in body:
        sys.exit(1)


if __name__ == "__main__":
    main()
