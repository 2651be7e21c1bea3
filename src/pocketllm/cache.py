"""The cache folder, for everything that can be recomputed: built-in models, compiled kernels, measured
sensitivities, results of tasks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$POCKETLLM_CACHE`, otherwise `pocketllm` under `$XDG_CACHE_HOME` or `~/.cache`.

    Where the user has no home folder (a container with an unknown user), it is one that cannot be created.
    """
    own = os.environ.get("POCKETLLM_CACHE")
    if own:
        return _expanded(own)
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pocketllm"


def _expanded(path: str) -> Path:
    found = os.path.expanduser(path)  # unlike Path.expanduser, takes ~NOBODY as it is
    return Path(os.devnull) / "no-home-folder" if found.startswith("~") else Path(found)
