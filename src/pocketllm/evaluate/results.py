"""Results of tasks in the cache, so that an interrupted evaluation resumes with the next task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketllm.cache import cache_folder
from pocketllm.files import sha256_file, write_json
from pocketllm.format.checkpoint import REPORT_NAME

RESULT_VERSION = 1  # raised when results of earlier versions must not be used


def folder_digest(folder: Path) -> str:
    """Identity of a model: SHA-256 over the names and contents of its files.

    For a compressed model its own list of checksums is used (`pocketllm.load` verifies it). The files of a dense
    model are read in full, since a fine-tuned model may differ from another only in the middle of a file.
    """
    digest = hashlib.sha256()
    report = folder / REPORT_NAME
    if report.is_file():
        listed = json.loads(report.read_text(encoding="utf-8")).get("files", {})
        found = {name: facts["sha256"] for name, facts in listed.items()}
    else:
        found = {file.name: sha256_file(file) for file in folder.iterdir() if file.is_file()}
    for name in sorted(found):
        digest.update(f"{name}:{found[name]}\n".encode())
    return digest.hexdigest()


def _path(identity: Mapping[str, Any]) -> Path:
    text = json.dumps({"result_version": RESULT_VERSION, **identity}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return cache_folder() / "eval" / "results" / f"{digest[:32]}.json"


def recall(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cached result for this identity, or None."""
    try:
        kept = json.loads(_path(identity).read_text(encoding="utf-8"))
        return dict(kept["result"]) if kept["identity"] == dict(identity) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or damaged: measured again


def keep(identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Cache a result under its identity: everything it depends on."""
    path = _path(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"identity": dict(identity), "result": dict(result)})
