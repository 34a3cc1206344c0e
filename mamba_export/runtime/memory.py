"""How much memory this process has taken, on the host and on an NVIDIA GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start :func:`peak_host` anew; False where the system can't (it then counts from the process's start)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_host() -> int:
    """Largest resident memory so far, in bytes: mapped files that were read count too."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory() -> int | None:
    """Bytes this process holds on NVIDIA GPUs now; None when nvidia-smi can't tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        fields = [line.split(",") for line in lines]
        return sum(int(used) << 20 for pid, used in fields if int(pid) == os.getpid()) or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
