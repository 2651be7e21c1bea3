"""Read and write single files: JSON, checksums, and checks that a path is a regular file of its folder."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pocketllm.errors import PocketError, cannot_read

_LARGEST_JSON = 1 << 28  # bytes; the report of a model with a million matrices is below


_PART = 1 << 24  # bytes: a thread that reads a file asks for the interpreter lock once for each part


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name and rename it when complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file of moderate size.

    Raises:
        OSError: no regular file, or it cannot be read.
        ValueError: not JSON, not UTF-8, nested too deeply, or too large.
    """
    size = os.stat(path).st_size
    if not path.is_file():
        raise OSError("not a regular file")
    if size > _LARGEST_JSON:
        raise ValueError(f"{size} bytes, wanted at most {_LARGEST_JSON}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of a file that must hold an object.

    Raises:
        OSError, ValueError: as `read_json`; or it holds another value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def real_path(path: Path) -> Path:
    """An absolute path without links, `.` and `..`; unlike `Path.resolve`, links in a loop raise nothing."""
    return Path(os.path.realpath(path))


def need_regular(path: Path, error: type[PocketError]) -> None:
    """Check that a path is a regular file inside its folder. Opening a FIFO or a device may block forever, and a
    link may point to someone else's file. Links within the folder and those of the Hub's cache are accepted.

    Raises:
        error: naming the path.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path}: a link to a file that is missing; fetch it again") from None
        raise error(f"{path}: missing; fetch it again") from None
    except OSError as problem:  # a loop of links, no permission for the folder
        raise error(f"{path}: cannot be read ({problem.strerror}); fetch it again") from problem
    if not stat.S_ISREG(mode):
        raise error(f"{path}: not a regular file; remove it, or fetch the model again")
    if _leads_away(path):
        raise error(
            f"{path}: a link that leads out of the folder (to {real_path(path)}); put the file itself there"
        )


def _leads_away(path: Path) -> bool:
    folder, target = real_path(path.parent), real_path(path)
    if target.parent == folder or not path.is_symlink():
        return False
    models = [place.parent.parent for place in (folder, *folder.parents) if place.parent.name == "snapshots"]
    own = [model / "blobs" for model in models]  # of the hub's cache
    shared = [
        model.parent / "blobs" for model in models
    ]  # files that models have in common, in folders by hash
    in_hub = target.parent in own or target.parent.parent in shared
    return not in_hub and folder not in target.parents


def files_below(folder: Path, error: type[PocketError]) -> Iterator[str]:
    """Names of all files in a folder and the folders within, relative and with `/`; hidden ones are left out.

    Raises:
        error: a folder within is a link, or cannot be listed.
    """

    def refuse(problem: OSError) -> None:
        raise error(f"{problem.filename}: cannot be read ({problem.strerror})") from problem

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise error(f"{Path(place) / name}: a link to a folder; put the files themselves there")
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def copy_into(path: Path, out: IO[bytes]) -> None:
    """Append the content of a file to a stream.

    Raises:
        SourceError: the file cannot be read. OSError: the stream cannot be written.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise cannot_read(path, error) from error
    with stream:
        copy_stream(stream, out, path)


def copy_stream(stream: IO[bytes], out: IO[bytes], path: Path) -> None:
    """Append one stream to another. path: of the first, for the error; raises as `copy_into`."""
    while True:
        try:
            part = stream.read(_PART)
        except OSError as error:
            raise cannot_read(path, error) from error
        if not part:
            return
        out.write(part)


def is_utf8(text: str) -> bool:
    """Whether a text can be written down; a name of the system that it cannot decode holds lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, if the system supports it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # file systems that have no such thing
        pass
    finally:
        os.close(handle)


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """(entry of every tensor, byte at which their data begin) of a safetensors file, without its metadata."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def sha256_file(path: Path) -> str:
    """Hex digest of a file, mapped into memory in parts."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        for begin in range(0, size, _PART):
            length = min(_PART, size - begin)
            with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=begin) as part:
                digest.update(part)
    return digest.hexdigest()
