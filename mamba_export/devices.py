"""The table of devices that :mod:`mamba_export.plan` knows; adding one is adding a row."""

from __future__ import annotations

from dataclasses import dataclass

from mamba_export.errors import UsageError


@dataclass(frozen=True)
class Device:
    """A machine that decodes.

    Attributes:
        name: the value of ``--device``.
        title: for people.
        memory: bytes that CPU and GPU share, or of the GPU alone.
        bandwidth: bytes a second, as the maker states it.
        reserved: bytes that the system keeps for itself: an estimate.
        gpu: whether models run on a GPU, where weights are not packed into a second copy.
        sm: the GPU's compute capability without a dot, e.g. ``87``; empty without an NVIDIA GPU.
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    reserved: float
    gpu: bool = True
    sm: str = ""

    @property
    def jetson(self) -> bool:
        """Whether it runs JetPack."""
        return self.title.startswith("Jetson")


def _row(name: str, title: str, memory: float, bandwidth: float, reserved: float, sm: str = "") -> Device:
    """A row in GB and GB/s."""
    return Device(name, title, memory * 1e9, bandwidth * 1e9, reserved * 1e9, bool(sm), sm)


DEVICES = {
    device.name: device
    for device in (
        _row("orin-nano-4gb", "Jetson Orin Nano 4 GB", 4, 34, 1.2, "87"),
        _row("orin-nano-8gb", "Jetson Orin Nano 8 GB", 8, 68, 1.5, "87"),
        _row("orin-nano-8gb-super", "Jetson Orin Nano 8 GB, Super mode", 8, 102, 1.5, "87"),
        _row("orin-nx-8gb", "Jetson Orin NX 8 GB", 8, 102.4, 1.5, "87"),
        _row("orin-nx-16gb", "Jetson Orin NX 16 GB", 16, 102.4, 1.5, "87"),
        _row("agx-orin-32gb", "Jetson AGX Orin 32 GB", 32, 204.8, 2, "87"),
        _row("agx-orin-64gb", "Jetson AGX Orin 64 GB", 64, 204.8, 2, "87"),
        _row("thor", "Jetson AGX Thor", 128, 273, 3, "110"),
        _row("rtx-3060", "GeForce RTX 3060 12 GB", 12, 360, 0.5, "86"),
        _row("rtx-4060", "GeForce RTX 4060 8 GB", 8, 272, 0.5, "89"),
        _row("rtx-4090", "GeForce RTX 4090", 24, 1008, 0.5, "89"),
        _row("rtx-5070", "GeForce RTX 5070", 12, 672, 0.5, "120"),
        _row("rtx-5090", "GeForce RTX 5090", 32, 1792, 0.5, "120"),
        _row("h200", "H200", 141, 4800, 0.5, "90"),
        _row("raspberry-pi-5-4gb", "Raspberry Pi 5, 4 GB", 4, 17, 0.5),
        _row("raspberry-pi-5-8gb", "Raspberry Pi 5, 8 GB", 8, 17, 0.5),
        _row("raspberry-pi-5-16gb", "Raspberry Pi 5, 16 GB", 16, 17, 0.5),
    )
}


def get_device(name: str) -> Device:
    """The device of that name.

    Raises:
        UsageError: when there is none.
    """
    if name not in DEVICES:
        raise UsageError(f"no device named '{name}'", f"one of: {', '.join(DEVICES)}; or --memory and --bandwidth")
    return DEVICES[name]


def find_device_kind(name: str) -> Device:
    """The device of that name, or of several that begin with it the one with the least memory: ``orin-nano``.

    Raises:
        UsageError: when there is none.
    """
    found = [device for device in DEVICES.values() if device.name == name or device.name.startswith(f"{name}-")]
    return min(found, key=lambda device: device.memory) if found else get_device(name)
