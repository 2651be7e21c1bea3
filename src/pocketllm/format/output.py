"""Where a result may be put: what is there already, what would be destroyed, what the system takes."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pocketllm.errors import OutputError
from pocketllm.files import files_below, is_utf8, read_object
from pocketllm.format.checkpoint import REPORT_NAME

STATE_NAME, PUBLISHED = "state.json", "published"
_PROBE = ".pocketllm-probe-"
_LONGEST_NAME = 200  # bytes of a name; what is made beside it has a longer one, and systems take 255


def partial_folder(output: Path) -> Path:
    """Where the work on an output lies until it is finished."""
    return output.with_name(output.name + ".partial")


def named_output(output: str | Path) -> Path:
    """The folder that an output stands for: a link is followed, `.` and `..` get their names.

    Raises:
        OutputError: the name cannot be written down as UTF-8, or is too long for what is made beside it.
    """
    path = Path(output)
    if path.is_symlink() or path.name in ("", ".."):
        path = Path(os.path.realpath(path))
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
    """Refuse an output that would destroy something, or that cannot be made.

    Args:
        marker: the file by which a folder is known as ours; None: nothing that is there may be replaced.
        what: it is then, in words.

    Raises:
        OutputError: it exists and is not ours, or is ours and `overwrite` is not set, or cannot be made.
    """
    try:
        is_there = output.exists()
    except OSError as error:  # a name that the system does not take
        raise output_error(output, error) from error
    if is_there:
        with suppress(OSError):  # what is left of a run that was killed in its very last step
            partial_folder(output).rmdir()
    if is_there and not output.is_dir():
        raise OutputError(f"{output}: exists and is a file; choose another output folder")
    if is_published(output) or (is_held(output) and _is_publishing(output)):
        return
    if output.is_dir() and any(output.iterdir()):
        if marker is None:
            raise OutputError(f"{output}: exists and is not empty; choose another output folder")
        if not (output / marker).is_file():
            raise OutputError(f"{output}: exists and is not {what}; choose another output folder")
        if not overwrite:
            raise OutputError(f"{output}: {what} is there already; pass --overwrite to replace it")
        if is_held(output):
            raise OutputError(
                f"{output}: is the current folder or a mounted one, which cannot be replaced; run the command "
                "from another folder, or choose another output folder"
            )
    check_parent(output, "folder")


def check_not_nested(output: Path, folder: Path, kind: str = "folder") -> None:
    """Refuse an output in a folder that is only read.

    Args:
        kind: of output, in words.

    Raises:
        OutputError: it is that folder, lies in it, or holds it, so that replacing it would remove what is read.
    """
    wanted, read = output.resolve(), folder.resolve()
    if read in (wanted, *wanted.parents):
        where = "the model itself" if wanted == read else f"inside {folder}"
        raise OutputError(f"{output}: is {where}, which must stay unchanged; choose another output {kind}")
    if wanted in read.parents:
        raise OutputError(
            f"{output}: contains {folder}, which must stay unchanged; choose another output {kind}"
        )


def check_parent(output: Path, kind: str) -> None:
    """See that something can be made beside where `output` shall be, by making it: permissions do not say all.

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
    """Whether a run was killed after its result came into place, so that only its folder has to go."""
    facts = _published_files(output)
    return (
        bool(facts)
        and not (partial_folder(output) / "final").exists()
        and all((output / name).is_file() for name in facts)
        and all((output / name).stat().st_size == size for name, size in facts.items())
    )


def _is_publishing(output: Path) -> bool:
    """Whether what lies at the output comes from a run that was killed while it published its result."""
    facts = _published_files(output)
    return bool(facts) and set(files_below(output, OutputError)) <= facts.keys()


def output_error(output: Path, error: OSError) -> OutputError:
    """What the operating system refused, in words that say what to do."""
    where = error.filename or output
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{where}: the disk is full; free some space and run the same command again, "
            f"what is done is kept in {output}.partial"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{where}: no permission to write; choose another output folder")
    return OutputError(f"{where}: cannot be written ({error.strerror or error})")
