"""The GPU of this machine, asked of the driver itself: no package needed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_…


@dataclass(frozen=True)
class Device:
    """An NVIDIA GPU.

    Attributes:
        name: as the driver says it.
        sm: compute capability without a dot, e.g. ``87``.
        memory: bytes.
        integrated: shares its memory with the CPU (Jetson).
    """

    name: str
    sm: str
    memory: int
    integrated: bool


@functools.cache
def find_device(index: int = 0) -> Device | None:
    """The GPU of that number, or None when there is no driver or no such GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or index >= count.value:
        return None
    if cuda.cuDeviceGet(ctypes.byref(device), index):
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    sm = f"{attribute(_MAJOR)}{attribute(_MINOR)}"
    return Device(name.value.decode(errors="replace"), sm, memory.value, bool(attribute(_INTEGRATED)))
