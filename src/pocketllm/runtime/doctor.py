"""What is available on this machine, or why not: versions, processor, GPU, kernels, extras, cache, hook."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import pocketllm_startup
from pocketllm.cache import cache_folder
from pocketllm.codec.kernels import library
from pocketllm.codec.kernels.build_kernels import RECIPES, find_compiler
from pocketllm.errors import reason_of
from pocketllm.machine import machine, processor_features

# Optional module -> how it is installed.
EXTRAS = {
    "peft": "pip install 'pocketllm-codec[finetune]'",
    "matplotlib": "pip install 'pocketllm-codec[report]'",
    "jinja2": "pip install 'pocketllm-codec[report]'",
    "lm_eval": "pip install 'pocketllm-codec[eval]'",
    "datasets": "pip install 'pocketllm-codec[hub]'",
    "uvicorn": "pip install 'pocketllm-codec[serve]'",
    "vllm": "it wants an environment of its own",
}


def diagnose() -> dict[str, Any]:
    """Facts about this machine and this environment, ready for JSON; sizes in bytes.

    Compiles the kernels if they are not in the cache. A kernel, an extra or the hook that is missing has a
    `reason`, which says what to do.
    """
    facts = machine()
    return {
        "versions": facts.pop("versions"),
        **facts,
        "features": processor_features(),
        "memory_bytes": _memory(),
        "gpus": gpus(),
        "compiler": find_compiler(),
        "kernels": kernels(),
        "extras": extras(),
        "cache": cache(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "startup_hook": startup_hook(),
    }


def kernels() -> dict[str, Any]:
    """Availability of each kernel library: those in C++, and Triton."""
    reasons = {name: library.why_missing(name) for name in RECIPES}
    if not torch.cuda.is_available():
        reasons["triton"] = "torch sees no GPU"
    else:
        reasons["triton"] = "" if _installed("triton") else "not installed; it comes with torch for CUDA"
    return {name: _state(reason) for name, reason in reasons.items()}


def gpus() -> list[dict[str, Any]]:
    """Name and memory of every GPU that torch sees."""
    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]


def cache() -> dict[str, Any]:
    """The cache folder, what it holds, and whether it can be written to."""
    folder = cache_folder()
    reason = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{reason_of(error)}; point POCKETLLM_CACHE at a folder that can be written to"
    free = None if reason else shutil.disk_usage(folder).free
    return {"folder": str(folder), "bytes": _bytes_in(folder), "free_disk_bytes": free, **_state(reason)}


def extras() -> dict[str, Any]:
    """Versions of the optional packages."""
    distributions = importlib.metadata.packages_distributions()
    found: dict[str, Any] = {}
    for name, command in EXTRAS.items():
        version = None
        if _installed(name):
            named = distributions.get(name, [])
            version = importlib.metadata.version(named[0]) if named else "unknown"
        found[name] = {"version": version, **_state("" if version else f"not installed; {command}")}
    return found


def startup_hook() -> dict[str, Any]:
    """Whether programs that do not import pocketllm load compressed models, too; see docs/loading.md."""
    if os.environ.get(pocketllm_startup.OFF) == "1":
        return _state(f"{pocketllm_startup.OFF}=1 is set")
    if not pocketllm_startup.started:
        return _state(
            "pocketllm_startup.pth is in no site-packages folder that Python read when it started; "
            "install the package, or import pocketllm before loading"
        )
    return _state("")


def _state(reason: str) -> dict[str, Any]:
    return {"works": not reason, "reason": reason}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder; files deleted meanwhile count as 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


def _memory() -> int | None:
    """Memory of the machine in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
