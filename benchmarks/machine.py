"""What a benchmark ran on: processor, memory, versions, date and how busy the machine was."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path


def processor() -> str:
    """Name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def vector_extensions() -> str:
    """The widest vector instructions of an x86 processor, or an empty string."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    return next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")


def memory_gib() -> float:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe(packages: tuple[str, ...] = ("torch", "onnxruntime", "transformers")) -> str:
    """One line for the top of a result."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    facts = [
        f"{processor()} {vector_extensions()}".strip(),
        f"{os.cpu_count()} cores",
        f"{memory_gib():.0f} GiB",
        f"Python {platform.python_version()}",
        *versions,
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"load {os.getloadavg()[0]:.1f} at the start",
    ]
    return ", ".join(facts)


def peak_rss_bytes() -> int:
    """Most memory this process has held; clean pages of mapped files count."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss_bytes() -> int:
    """Memory this process holds now."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
