"""Check where a single file may be written, and write it atomically."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from pocketllm.errors import OutputError
from pocketllm.format.output import check_not_nested, check_parent, named_output


def check_target(path: Path, only_read: Iterable[str | Path] = ()) -> None:
    """Check before any work that a file can be written.

    Args:
        only_read: folders that it must not be in.

    Raises:
        OutputError: as `named_output`; a folder of that name,
            a parent that is a file, or one that cannot be written or is only read.
    """
    named_output(path)  # its name can be made
    if path.is_dir():
        raise OutputError(f"{path}: exists and is a folder; name a file")
    for folder in only_read:
        check_not_nested(path, Path(folder), "file")
    check_parent(path, "file")


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, then rename; missing folders are made.

    Raises:
        OutputError: the disk is full, no permission, or another refusal of the system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reasons = {errno.ENOSPC: "the disk is full; free some space", errno.EACCES: "no permission to write"}
        reason = reasons.get(error.errno or 0, f"cannot be written ({error.strerror or error})")
        raise OutputError(f"{path}: {reason}") from error
