"""The machine on which a measurement ran."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# Instruction sets that decide how fast compressed models run, by their names in /proc/cpuinfo.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "gfni", "amx_int8", "amx_bf16")


def processor_features() -> dict[str, bool] | None:
    """Which of `FEATURES` the processor has; None where the system does not say (no /proc/cpuinfo)."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    return {name: name in flags for name in FEATURES}


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not say (no /proc/self/statm)."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else None


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads in use, system, versions; the GPU's name if `device` is cuda."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in ("pocketllm-codec", "torch", "transformers", "faiss-cpu", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
