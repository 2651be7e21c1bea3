"""Model folders in the cache: made on first use under a temporary name, and renamed when complete.

The temporary folder holds a file that its process keeps locked, so that others can tell those of killed processes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from pocketllm.errors import SourceError
from pocketllm.source.folder import open_safetensors
from pocketllm.source.model_files import weight_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = "pocketllm-lock"


def kept_folder(folder: Path, make: Callable[[Path], Path], nbytes: Callable[[], int]) -> Path:
    """A model folder in the cache, made on first use.

    Args:
        make: fills a folder within the one it is given, and returns it. nbytes: of disk that it needs, about; called
            if there are not enough.

    Raises:
        SourceError: as `make`; or the cache cannot be written.
    """
    if (folder / "config.json").is_file() and _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with _scratch(folder) as scratch:
            made = make(scratch)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # another process was quicker
                    raise
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); "
            f"point POCKETLLM_CACHE at a folder with {nbytes() / 1e6:,.0f} MB to spare"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether the weights in the cache can be opened; a damaged folder is removed, so that it is made again."""
    try:
        for file in weight_files(folder):
            open_safetensors(file)
    except SourceError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder next to another, with a file that is locked as long as this process needs it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        place = Path(name)
        with (place / f"{_LOCK}.new").open("wb") as stream:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(stream, fcntl.LOCK_EX)
                    (place / f"{_LOCK}.new").rename(
                        place / _LOCK
                    )  # only now, so that it is never seen unlocked
            yield place


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed while they made this folder."""
    own = f".{escape(folder.name)}-*/{_LOCK}"
    for lock in folder.parent.glob(own) if fcntl is not None else ():
        with suppress(OSError), lock.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process lives
            shutil.rmtree(lock.parent, ignore_errors=True)
