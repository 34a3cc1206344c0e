"""What every benchmark of an op shares: the peer, timing, the result table.

Timing: a CUDA graph of many calls that rotate over input sets larger together than the L2 cache, replayed between
events; the median over replays, per call. Both sides are timed so, each in its own native layout.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

PEERS = {"mamba_ssm": "mamba-ssm==2.3.2.post1", "causal_conv1d": "causal-conv1d==1.7.0"}
NVCC_FLAGS = ["-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
              "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
              "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__",
              "-U__CUDA_NO_BFLOAT162_CONVERSIONS__", "-gencode=arch=compute_90,code=sm_90"]  # fmt: skip


@dataclass
class Row:
    """One measured case. ``work`` is in ``unit`` (G per second is reported), ``bytes`` the least memory traffic.

    ``copy_ms`` is what a copy of as many bytes takes, timed the same way: a launch of a few microseconds never moves
    them at the bandwidth of a large one.
    """

    op: str
    case: str
    ours_ms: float
    peer_ms: float | None = None
    work: float = 0.0
    unit: str = ""
    bytes: float = 0.0
    floor_ms: float | None = None
    copy_ms: float | None = None
    ours_error: float | None = None
    peer_error: float | None = None
    note: str = ""


@dataclass
class Context:
    """Where sources of the peer lie and what has been built of it."""

    sources: Path
    quick: bool = False
    copy_bandwidth: float = 0.0
    modules: dict[str, Any] = field(default_factory=dict)

    def peer(self, name: str) -> Any:
        """The peer's extension ``selective_scan`` or ``causal_conv1d``, forward only; built at first use."""
        if name not in self.modules:
            self.modules[name] = build_peer(self.sources, name)
        return self.modules[name]


def peer_source(folder: Path, package: str) -> Path:
    """The unpacked source package, downloaded into ``folder`` unless it lies there."""
    name, version = PEERS[package].replace("-", "_").split("==")
    root = folder / f"{name}-{version}"
    archive = folder / f"{name}-{version}.tar.gz"
    if not root.is_dir():
        if not archive.is_file():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:",
                       "--no-build-isolation", "-d", str(folder), PEERS[package]]  # fmt: skip
            subprocess.run(command, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return root


def _without_function(source: str, name: str) -> str:
    """``source`` without the top-level definition of ``name`` and its line in the module table."""
    source = re.sub(rf"\n(?:std::vector<at::Tensor>|void)\n{name}\(.*?\n}}\n", "\n", source, flags=re.DOTALL)
    return re.sub(rf"\n\s*m\.def\([^;]*&{name}[^;]*;", "", source)


def build_peer(sources: Path, name: str) -> Any:
    """The peer's extension; one built earlier for this torch, at ``build_<name>/peer_<name>.so``, is taken as it is."""
    from torch.utils.cpp_extension import load

    built = sources / f"build_{name}" / f"peer_{name}.so"
    if built.is_file():
        spec = importlib.util.spec_from_file_location(f"peer_{name}", built)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if name == "selective_scan":
        csrc = peer_source(sources, "mamba_ssm") / "csrc" / "selective_scan"
        files, backward = sorted(csrc.glob("selective_scan_fwd_*.cu")), "selective_scan_bwd"
    else:
        csrc = peer_source(sources, "causal_conv1d") / "csrc"
        files, backward = [csrc / "causal_conv1d_fwd.cu", csrc / "causal_conv1d_update.cu"], "causal_conv1d_bwd"
    forward = csrc / f"{name}_forward.cpp"
    forward.write_text(_without_function((csrc / f"{name}.cpp").read_text(), backward))
    build = sources / f"build_{name}"
    build.mkdir(parents=True, exist_ok=True)
    return load(f"peer_{name}", [str(forward), *map(str, files)], extra_cflags=["-O3", "-std=c++17"],
                extra_cuda_cflags=NVCC_FLAGS, extra_include_paths=[str(csrc)], build_directory=str(build))  # fmt: skip


def time_ms(calls: Sequence[Callable[[], Any]], budget_ms: float = 60.0, replays: int = 9) -> float:
    """Median milliseconds of one call; ``calls`` do the same work on different buffers."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
        stream.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def elapsed(run: Callable[[], Any]) -> float:
            start.record()
            run()
            stop.record()
            stream.synchronize()
            return float(start.elapsed_time(stop))

        # The least of five: after a slow call too few would make up the graph, whose own launch then tells.
        once = max(min(elapsed(calls[i % len(calls)]) for i in range(5)), 2e-3)
        count = int(min(max(budget_ms / replays / once, 1), 200))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
        graph.replay()
        stream.synchronize()
        times = [elapsed(graph.replay) / count for _ in range(replays)]
    return float(statistics.median(times))


def sets_for(bytes_per_set: float, l2_bytes: float = 130e6, most: int = 96) -> int:
    """How many input sets a rotation needs to be larger than the L2 cache, twice over."""
    return int(min(max(2, l2_bytes // bytes_per_set + 1), most))


def copy_bandwidth() -> float:
    """Bytes per second of a large elementwise copy, counting reads and writes (faster than the copy engine's)."""
    a = torch.empty(2**28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / (time_ms([lambda: torch.neg(a, out=b)]) * 1e-3)


def bound_by_copies(row: Row, ctx: Context) -> None:
    """The floor and ``copy_ms`` of an op that only moves its bytes."""
    row.floor_ms, row.copy_ms = row.bytes / ctx.copy_bandwidth * 1e3, copy_ms(row.bytes)


def copy_ms(size: float) -> float:
    """Milliseconds of an elementwise copy that reads and writes ``size`` bytes together, over rotating buffers."""
    pairs = [torch.empty(2, int(size) // 8, dtype=torch.float32, device="cuda") for _ in range(sets_for(size))]
    return time_ms([partial(torch.neg, pair[0], out=pair[1]) for pair in pairs])


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def table(rows: Sequence[Row]) -> str:
    """The markdown table of one op."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    unit = rows[0].unit
    head = "| case | ours ms | peer ms | ratio |"
    lines = [f"{head} {unit} | GB/s | of the floor | copy ms | error ours | error peer | |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        ratio = None if r.peer_ms is None else r.peer_ms / r.ours_ms
        share = None if r.floor_ms is None else r.floor_ms / r.ours_ms
        lines.append(
            f"| {r.case} | {r.ours_ms:.4f} | {number(r.peer_ms, '.4f')} | {number(ratio, '.2f')} "
            f"| {r.work / r.ours_ms / 1e6:.1f} | {r.bytes / r.ours_ms / 1e6:.0f} | {number(share, '.0%')} "
            f"| {number(r.copy_ms, '.4f')} | {number(r.ours_error, '.2e')} | {number(r.peer_error, '.2e')} | {r.note} |"
        )
    return "\n".join(lines)
