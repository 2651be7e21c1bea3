"""The cache folder, for everything that can be recomputed: built-in models, compiled kernels, measured
sensitivities, results of tasks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$POCKETLLM_CACHE`, otherwise `pocketllm` under `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("POCKETLLM_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pocketllm"
