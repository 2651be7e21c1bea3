"""Process-wide settings: quiet libraries, threads, device."""

from __future__ import annotations

import os
import sys
import warnings
from logging import getLogger

from pocketllm.cli import print_json_error
from pocketllm.errors import ConfigError, RankError
from pocketllm.rank_watch import on_failure


def setup_process(device: str = "cpu", threads: int = 0) -> None:
    """Quiet transformers, set threads, check the device; end with a message if another rank fails.

    Raises:
        ConfigError: an unknown device, or one that is not available.
    """
    on_failure(_show_failure)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch and faiss bring an OpenMP runtime each; idle threads of one must not spin while the other works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate.big_modeling").setLevel("ERROR")  # logs every model on the disk
    if threads:
        torch.set_num_threads(threads)
        import faiss

        faiss.omp_set_num_threads(threads)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {device!r}, wanted cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")


def _show_failure(message: str) -> None:
    print_json_error(RankError.__name__, message)
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
