"""The folder `OUTPUT.partial`: finished units of a compression that is under way, and what it was asked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.errors import OutputError, ResumeError
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.source import DenseCheckpoint

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LOCK_NAME = "lock"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputError: it exists and is not ours, or is ours and `overwrite` is not set, or cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: exists and is a file; choose another output folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / ckpt.REPORT_NAME).is_file():
            raise OutputError(f"{output}: exists and is not a compressed model; choose another output folder")
        if not overwrite:
            raise OutputError(
                f"{output}: a compressed model is there already; pass --overwrite to replace it"
            )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write here; choose another output folder")


@contextmanager
def locked(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Keep other processes out of a folder; those launched together share it, their first one holds it.

    Raises:
        OutputError: another process is at work in it.
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


@dataclass(frozen=True)
class Workspace:
    """The folder `OUTPUT.partial`."""

    folder: Path

    @classmethod
    def open(
        cls, output: Path, source: DenseCheckpoint, config: CompressConfig, model: str, device: str
    ) -> Workspace:
        """Make the folder, or go on in it.

        Raises:
            ResumeError: it holds a run with other arguments. OutputError: it is not ours.
        """
        wanted = {
            "version": pocketllm.__version__,
            "format_version": ckpt.FORMAT_VERSION,
            "model": model,
            "weights": source.fingerprint(),
            "device": device,
            "threads": torch.get_num_threads(),
            **config.to_dict(),
        }
        return cls.at(output, wanted)

    @classmethod
    def at(cls, output: Path, arguments: Mapping[str, Any]) -> Workspace:
        """`open` for any kind of run. arguments: all that its result depends on, plain JSON types.

        Raises:
            ResumeError: it holds a run with other arguments. OutputError: it is not ours, or in use.
        """
        folder = output.with_name(output.name + ".partial")
        wanted = json.loads(json.dumps(_flat(arguments)))  # as it is read back: lists for tuples
        state = folder / "state.json"
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            differing = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
            if differing and {path.name for path in folder.iterdir()} == {state.name, _LOCK_NAME}:
                with locked(folder):  # a run that failed before anything was done: nothing to lose
                    ckpt.write_json(state, wanted)
            elif differing:
                facts = "; ".join(f"{k}: {found.get(k)!r} then, {wanted.get(k)!r} now" for k in differing)
                raise ResumeError(
                    f"{folder}: holds a half-done run with other arguments ({facts}); "
                    "run with the same arguments to go on, or delete that folder to start anew"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: exists and is not ours; move it away")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            ckpt.write_json(state, wanted)
        return cls(folder)

    def has(self, name: str) -> bool:
        """Whether a unit is finished."""
        return (self.folder / name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep one finished unit."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        metadata = {"facts": json.dumps(facts)}
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(temporary), metadata)
        except Exception as error:  # safetensors reports a full disk as its own error, not as OSError
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(temporary)) from error
            raise
        temporary.replace(path)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished unit."""
        with safe_open(str(self.folder / name), framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return tensors, json.loads(handle.metadata()["facts"])

    def refined(self) -> dict[str, Tensor]:
        """What refinement of the blocks changed, by `KIND|NAME`."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("refined-*.safetensors")):
            found |= self.load(path.name)[0]
        return found

    def publish(self, output: Path) -> None:
        """Rename the finished checkpoint into place and drop the rest."""
        if output.is_dir():
            output.rename(self.folder / "old")
        (self.folder / "final").rename(output)
        shutil.rmtree(self.folder)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
