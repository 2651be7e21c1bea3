"""Support for processes that measure themselves: imports before the clock starts, and peak memory."""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path


def import_all(folder: str) -> None:
    """Import everything that loading and running a model imports, before time and memory are measured."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import pocketllm
    from pocketllm.codec.kernels import select
    from pocketllm.source import need_tokenizer

    pocketllm.load  # noqa: B018
    select.packed_isa()  # builds and tries the kernels
    need_tokenizer(Path(folder))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    gc.collect()  # now, not at some point of what is measured


def peak_bytes(device: str, forget: bool = False) -> int:
    """Most memory that this process has held so far: resident, or allocated on the GPU.

    forget: do not count memory that has been released by now.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process, too
        if forget:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
