"""Results of tasks in the cache, so that an interrupted evaluation resumes with the next task."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError
from pocketllm.files import need_regular, read_json, sha256_file, write_json
from pocketllm.format.checkpoint import REPORT_NAME, read_report

logger = logging.getLogger(__name__)

RESULT_VERSION = 1  # raised when results of earlier versions must not be used


def folder_digest(folder: Path) -> str:
    """Identity of a model: SHA-256 over the names and contents of its files.

    For a compressed model its own list of checksums is used (`pocketllm.load` verifies it). The files of a dense
    model are read in full, since a fine-tuned model may differ from another only in the middle of a file.
    """
    digest = hashlib.sha256()
    report = folder / REPORT_NAME
    if report.is_file():
        found = {name: facts["sha256"] for name, facts in read_report(folder)["files"].items()}
    else:
        found = {file.name: _sha256(file) for file in folder.iterdir() if not file.is_dir()}
    for name in sorted(found):
        digest.update(f"{name}:{found[name]}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    need_regular(file, SourceError)
    return sha256_file(file)


def _path(identity: Mapping[str, Any]) -> Path:
    text = json.dumps({"result_version": RESULT_VERSION, **identity}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return cache_folder() / "eval" / "results" / f"{digest[:32]}.json"


def recall(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cached result for this identity, or None."""
    try:
        kept = read_json(_path(identity))
        return dict(kept["result"]) if kept["identity"] == dict(identity) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or damaged: measured again


def keep(identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Cache a result under its identity: everything it depends on."""
    path = _path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"identity": dict(identity), "result": dict(result)})
    except OSError as error:
        logger.warning("%s: the result cannot be kept for later (%s)", path, error.strerror or error)
