"""The folder `OUTPUT.partial`: finished units of a run in progress, and its arguments."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.config.checks import flat
from pocketllm.errors import OutputError, ResumeError, reason_of
from pocketllm.files import write_json
from pocketllm.format import checkpoint as ckpt
from pocketllm.source.dense_checkpoint import DenseCheckpoint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_STATE, _LOCK_NAME = "state.json", "lock"


def check_output(
    output: Path,
    overwrite: bool = False,
    marker: str | None = ckpt.REPORT_NAME,
    what: str = "a compressed model",
) -> None:
    """Refuse an output that would destroy something or cannot be created.

    Args:
        marker: the file that identifies a folder created by pocketllm; None: nothing may be replaced.
        what: what such a folder is, in words.

    Raises:
        OutputError: it exists and is not such a folder, `overwrite` is not set, or it cannot be created.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: exists and is a file; choose another output folder")
    if output.is_dir() and any(output.iterdir()):
        if marker is None:
            raise OutputError(f"{output}: exists and is not empty; choose another output folder")
        if not (output / marker).is_file():
            raise OutputError(f"{output}: exists and is not {what}; choose another output folder")
        if not overwrite:
            raise OutputError(f"{output}: already contains {what}; pass --overwrite to replace it")
    check_parent(output, "folder")


def check_not_nested(output: Path, folder: Path, kind: str = "folder") -> None:
    """Refuse an output in a folder that must stay unchanged.

    Args:
        kind: of output, in words.

    Raises:
        OutputError: it is that folder, is inside it, or contains it, so that replacing it would remove an input.
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
    """Check that `output` can be created, by creating something next to it; permissions alone do not tell.

    Args:
        kind: of output, in words.

    Raises:
        OutputError: names the nearest folder that exists.
    """
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent}: is a file, wanted a folder; choose another output {kind}")
    try:
        tempfile.TemporaryDirectory(prefix=".pocketllm-", dir=parent).cleanup()
    except OSError as error:
        raise OutputError(
            f"{parent}: cannot be written ({error.strerror or error}); choose another output {kind}"
        ) from error


@contextmanager
def locked(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Lock a folder against other processes; processes launched together share the lock of the first one.

    Raises:
        OutputError: another process uses it.
    """
    if not is_main or fcntl is None:
        yield
        return
    with (folder / _LOCK_NAME).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{folder}: in use by another process; wait for it, or choose another output folder"
            ) from error
        yield


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as OSError; safetensors wraps them in its own error."""
    try:
        yield
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def keep_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write measured tensors to a temporary name, then rename.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with system_errors(path):
            save_file(tensors, str(temporary), {"facts": json.dumps(facts)})
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); free some space there, or choose another output folder, "
            "or another folder with --calibration-cache or POCKETLLM_CACHE"
        ) from error


def output_error(output: Path, error: OSError) -> OutputError:
    """An error of the operating system, with a message that says what to do."""
    where = error.filename or output
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{where}: the disk is full; free some space and rerun the command to resume; "
            f"finished work is kept in {output}.partial"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{where}: no permission to write; choose another output folder")
    return OutputError(f"{where}: cannot be written ({error.strerror or error})")


@dataclass(frozen=True)
class Workspace:
    """The folder `OUTPUT.partial`."""

    folder: Path

    @classmethod
    def open(
        cls,
        output: Path,
        source: DenseCheckpoint,
        config: CompressConfig,
        model: str,
        device: str,
        text: str | None = None,
    ) -> Workspace:
        """Create the folder, or resume in it. text: identity of the calibration text.

        Raises:
            ResumeError: it contains a run with other arguments. OutputError: it was not created by pocketllm.
        """
        wanted = {
            "version": pocketllm.__version__,
            "format_version": ckpt.FORMAT_VERSION,
            "model": model,
            "weights": source.fingerprint(),
            "device": device,
            "calibration_text": text,
            "threads": torch.get_num_threads(),
            **config.to_dict(),
        }
        return cls.at(output, wanted)

    @classmethod
    def at(cls, output: Path, arguments: Mapping[str, Any]) -> Workspace:
        """`open` for any kind of run. arguments: everything its result depends on, in plain JSON types.

        Raises:
            ResumeError: it contains a run with other arguments.
            OutputError: it was not created by pocketllm, or is in use.
        """
        folder = _partial(output)
        wanted = json.loads(json.dumps(flat(arguments)))  # as it is read back: lists for tuples
        state = folder / _STATE
        if state.is_file():
            found = _read_state(state)
            differing = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
            if differing and {path.name for path in folder.iterdir()} == {state.name, _LOCK_NAME}:
                with locked(folder):  # a run that failed before anything was done: nothing to lose
                    write_json(state, wanted)
            elif differing:
                facts = "; ".join(f"{k}: {found.get(k)!r} then, {wanted.get(k)!r} now" for k in differing)
                raise ResumeError(
                    f"{folder}: contains an unfinished run with other arguments ({facts}); "
                    "rerun with the same arguments to resume, or delete that folder to start again"
                )
        elif folder.exists() and any(path.name != f".{_STATE}.tmp" for path in folder.iterdir()):
            raise OutputError(f"{folder}: was not created by pocketllm; move it away")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(state, wanted)
        return cls(folder)

    @staticmethod
    def is_begun(output: Path) -> bool:
        """Whether there is an unfinished run for this output."""
        return (_partial(output) / _STATE).is_file()

    def has(self, name: str) -> bool:
        """Whether a unit is finished."""
        return (self.folder / name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep one finished unit."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        with system_errors(temporary):
            stored = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(stored, str(temporary), {"facts": json.dumps(facts)})
        temporary.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished unit.

        Raises:
            ResumeError: it is damaged.
        """
        path = self.folder / name
        try:
            with safe_open(str(path), framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                return tensors, json.loads(handle.metadata()["facts"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, self.folder, error) from error

    def refined(self) -> dict[str, Tensor]:
        """The tensors changed by refinement of the blocks, by `KIND|NAME`."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("refined-*.safetensors")):
            found |= self.load(path.name)[0]
        return found

    def publish(self, output: Path) -> None:
        """Rename the finished checkpoint to its final name and delete the rest."""
        if output.is_dir():
            output.rename(self.folder / "old")
        (self.folder / "final").rename(output)
        # The state is deleted last, so that an interruption leaves a folder that is still recognized.
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _STATE:
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def damaged(path: Path, folder: Path, error: Exception) -> ResumeError:
    """The error for an unreadable file of an unfinished run."""
    return ResumeError(f"{path}: damaged ({reason_of(error)}); delete {folder} to start again")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise damaged(path, path.parent, error) from error


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")
