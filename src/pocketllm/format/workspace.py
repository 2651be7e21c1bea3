"""The folder `OUTPUT.partial`: finished units of a run in progress, and its arguments."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.config.checks import flat
from pocketllm.errors import OutputError, ResumeError, reason_of
from pocketllm.files import files_below, need_regular, read_object, sync_folder, write_json
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.kept import read_kept, write_kept
from pocketllm.format.output import (
    PUBLISHED,
    STATE_NAME,
    check_still_free,
    is_held,
    is_published,
    output_error,
    partial_folder,
    remove_empty,
)
from pocketllm.source.dense_checkpoint import DenseCheckpoint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = "lock"


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


def keep_tensors(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write measurements with `write_kept`, creating the folder.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_kept(path, tensors, facts)
    except OSError as error:
        raise cannot_keep(path, error) from error


def cannot_keep(path: Path, error: OSError) -> OutputError:
    """The error for measurements that cannot be written."""
    return OutputError(
        f"{path}: cannot be written ({error.strerror}); free some space there, or choose another output folder, "
        "or another folder with --calibration-cache or POCKETLLM_CACHE"
    )


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
        folder = partial_folder(output)
        wanted = json.loads(json.dumps(flat(arguments)))  # as it is read back: lists for tuples
        state = folder / STATE_NAME
        if state.is_file():
            for name in files_below(folder, OutputError):
                need_regular(folder / name, OutputError)
            found = _read_state(state)
            found.pop(PUBLISHED, None)
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
        elif folder.exists() and any(path.name != f".{STATE_NAME}.tmp" for path in folder.iterdir()):
            raise OutputError(f"{folder}: exists and was not created by pocketllm; move it away")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(state, wanted)
        return cls(folder)

    @staticmethod
    def is_begun(output: Path) -> bool:
        """Whether there is an unfinished run for this output."""
        return (partial_folder(output) / STATE_NAME).is_file()

    def has(self, name: str) -> bool:
        """Whether a unit is finished."""
        return (self.folder / name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep one finished unit."""
        write_kept(self.folder / name, tensors, facts)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished unit.

        Raises:
            ResumeError: it is damaged.
        """
        path = self.folder / name
        try:
            return read_kept(path)
        except (OSError, ValueError) as error:
            raise damaged(path, self.folder, error) from error

    def refined(self) -> dict[str, Tensor]:
        """The tensors changed by refinement of the blocks, by `KIND|NAME`."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("refined-*.safetensors")):
            found |= self.load(path.name)[0]
        return found

    def publish(self, output: Path, overwrite: bool = False) -> None:
        """Rename the finished result into place and drop the rest.

        The state records what is being published, so that a run killed meanwhile can be rerun.

        Raises:
            OutputError: as `check_still_free`.
        """
        check_still_free(output, overwrite)
        final, old = self.folder / "final", self.folder / "old"
        facts = {name: (final / name).stat().st_size for name in files_below(final, OutputError)}
        for name in facts:
            with (final / name).open("rb") as stream:
                os.fsync(stream.fileno())
        state = _read_state(self.folder / STATE_NAME)
        write_json(self.folder / STATE_NAME, {**state, PUBLISHED: facts})
        if is_held(output):
            _move_into(final, output)
        else:
            if output.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                output.rename(old)
            final.rename(output)
        sync_folder(output.parent)
        self.drop()

    def drop(self) -> None:
        """Remove the folder; the state, which identifies it, goes last."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != STATE_NAME:
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_published(output: Path) -> None:
    """Remove the working folder of a finished output, which a run that was killed after publishing has left.

    Commands whose output is made in several stages call it for each stage that they do not make again.

    Raises:
        OutputError: it is in use, or cannot be removed.
    """
    try:
        if is_published(output):
            work = Workspace(partial_folder(output))
            with locked(work.folder):
                work.drop()
        elif output.exists():
            remove_empty(output)
    except OSError as error:
        raise output_error(output, error) from error


def _move_into(final: Path, output: Path) -> None:
    """Move files into a folder; those that identify a result come last."""
    names = sorted(files_below(final, OutputError), key=lambda name: (name.startswith("pocketllm"), name))
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (final / name).replace(output / name)
    shutil.rmtree(final)


def damaged(path: Path, folder: Path, error: Exception) -> ResumeError:
    """The error for an unreadable file of an unfinished run."""
    return ResumeError(f"{path}: damaged ({reason_of(error)}); delete {folder} to start again")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise damaged(path, path.parent, error) from error
