"""Machine and versions on which measured times and memory depend beside the code."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from streamconv.planning.devices import Device

_LIBRARIES = ("streamconv", "torch", "transformers", "bitsandbytes", "peft")


def machine(device: Device) -> Mapping[str, str | int]:
    """Processor, memory, device, and versions of libraries."""
    return {
        **processor(),
        "device": str(device) if device.is_cpu else f"{device} ({device.model})",
        "python": platform.python_version(),
        **versions(_LIBRARIES),
    }


def processor() -> Mapping[str, str | int]:
    """Name, cores that this process may use, memory of the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions(names: Iterable[str]) -> Mapping[str, str]:
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
