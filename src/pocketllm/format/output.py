"""Checks on where a result is written: existing contents, overlap with inputs, limits of the system."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pocketllm.errors import OutputError
from pocketllm.files import files_below, is_utf8, read_object, real_path
from pocketllm.format.checkpoint import REPORT_NAME

STATE_NAME, PUBLISHED = "state.json", "published"
_PROBE = ".pocketllm-probe-"
_LONGEST_NAME = 200  # bytes of a name; what is made beside it has a longer one, and systems take 255


def partial_folder(output: Path) -> Path:
    """The folder that holds an unfinished output."""
    return output.with_name(output.name + ".partial")


def remove_empty(output: Path) -> None:
    """Remove the working folder of a finished output if a run was killed just before its removal."""
    with suppress(OSError):
        partial_folder(output).rmdir()


def named_output(output: str | Path) -> Path:
    """The folder that an output path refers to: links, `.` and `..` are resolved.

    Raises:
        OutputError: links in a loop, the root folder, or a name that is not UTF-8 or too long for the temporary names
            derived from it.
    """
    path = Path(output)
    if path.is_symlink() or path.name in ("", ".."):
        path = real_path(path)
    if path.is_symlink():
        raise OutputError(f"{path}: links in a loop; choose another output folder")
    if not path.name:
        raise OutputError(f"{path}: is the root folder; choose another output folder")
    if not is_utf8(str(path)):
        raise OutputError(
            f"{str(path)!a}: the name is not UTF-8; choose another name, or run in a UTF-8 locale"
        )
    length = len(os.fsencode(path.name))
    if length > _LONGEST_NAME:
        raise OutputError(
            f"{path}: the name has {length} bytes, wanted at most {_LONGEST_NAME}; choose a shorter one"
        )
    return path


def is_held(output: Path) -> bool:
    """Whether a folder cannot be replaced: the current one, or a mounted one."""
    try:
        return output.is_dir() and (output.is_mount() or output.samefile(Path.cwd()))
    except OSError:  # there is no current folder any more
        return False


def check_output(
    output: Path,
    overwrite: bool = False,
    marker: str | None = REPORT_NAME,
    what: str = "a compressed model",
) -> None:
    """Check that an output can be created and destroys nothing.

    Args:
        marker: the file that identifies a folder that pocketllm created and may replace; None replaces nothing.
        what: description of such a folder, for messages.

    Raises:
        OutputError: it exists and was not created by pocketllm, or it exists and `overwrite` is not set, or it lies
            inside a compressed model, or it cannot be created.
    """
    try:
        is_there = output.exists()
    except OSError as error:  # a name that the system does not take
        raise output_error(output, error) from error
    if is_there:
        remove_empty(output)
    if is_there and not output.is_dir():
        raise OutputError(f"{output}: exists and is a file; choose another output folder")
    _check_not_in_model(output)
    if is_published(output) or (is_held(output) and _is_publishing(output)):
        return
    if output.is_dir() and any(output.iterdir()):
        if marker is None:
            raise OutputError(f"{output}: exists and is not empty; choose another output folder")
        if not (output / marker).is_file():
            raise OutputError(f"{output}: exists and is not {what}; choose another output folder")
        if not overwrite:
            raise OutputError(f"{output}: {what} already exists; pass --overwrite to replace it")
        if is_held(output):
            raise OutputError(
                f"{output}: is the current folder or a mounted one, which cannot be replaced; run the command "
                "from another folder, or choose another output folder"
            )
    check_parent(output, "folder")


def _check_not_in_model(output: Path) -> None:
    """Raises OutputError if the folder lies inside a compressed model, which would be refused as altered."""
    for parent in real_path(output).parents:
        if (parent / REPORT_NAME).is_file():
            raise OutputError(
                f"{output}: is inside the compressed model {parent}; choose another output folder"
            )


def check_not_nested(output: Path, folder: Path, kind: str = "folder") -> None:
    """Check that an output does not overlap a folder that is only read.

    Args:
        kind: of output, in words.

    Raises:
        OutputError: it is that folder, lies inside it, or contains it.
    """
    wanted, read = real_path(output), real_path(folder)
    if read in (wanted, *wanted.parents):
        where = "the model itself" if wanted == read else f"inside {folder}"
        raise OutputError(f"{output}: is {where}, which must stay unchanged; choose another output {kind}")
    if wanted in read.parents:
        raise OutputError(
            f"{output}: contains {folder}, which must stay unchanged; choose another output {kind}"
        )


def check_parent(output: Path, kind: str) -> None:
    """Check that the parent folder of `output` is writable, by writing: permission bits are not enough.

    Args:
        kind: of output, in words.

    Raises:
        OutputError: naming the nearest folder that exists.
    """
    parent = output.absolute().parent
    try:
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise output_error(output, error) from error
    if not parent.is_dir():
        raise OutputError(f"{parent}: is a file, wanted a folder; choose another output {kind}")
    try:
        for left in parent.glob(f"{_PROBE}*"):  # of a process that was killed here
            with suppress(OSError):
                left.rmdir()
        probe = Path(tempfile.mkdtemp(prefix=_PROBE, dir=parent))
        with suppress(FileNotFoundError):  # removed by another process, as above
            probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"{parent}: cannot be written ({error.strerror or error}); choose another output {kind}"
        ) from error


def _published_files(output: Path) -> dict[str, int]:
    """Files of the result that a run was publishing, with their sizes; empty where there is none."""
    state = partial_folder(output) / STATE_NAME
    try:
        found = read_object(state).get(PUBLISHED) if output.is_dir() else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_published(output: Path) -> bool:
    """Whether a run was killed after publishing its result, so that only its working folder has to be removed."""
    facts = _published_files(output)
    return (
        bool(facts)
        and not (partial_folder(output) / "final").exists()
        and all((output / name).is_file() for name in facts)
        and all((output / name).stat().st_size == size for name, size in facts.items())
    )


def _is_publishing(output: Path) -> bool:
    """Whether the output comes from a run that was killed while publishing it."""
    facts = _published_files(output)
    return bool(facts) and set(files_below(output, OutputError)) <= facts.keys()


def output_error(output: Path, error: OSError) -> OutputError:
    """The error for a failure of the operating system, with advice."""
    where = error.filename or output
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{where}: the disk is full; free some space and run the same command again, "
            f"what is done is kept in {output}.partial"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{where}: no permission to write; choose another output folder")
    return OutputError(f"{where}: cannot be written ({error.strerror or error})")
