"""The teacher: the dense model's next-token distributions, run batch by batch or computed once (top k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from pocketllm.compression.progress import Event, ProgressCallback
from pocketllm.errors import ConfigError, OutputError, reason_of
from pocketllm.files import read_object, write_json
from pocketllm.format.workspace import damaged, locked
from pocketllm.recover.kl_loss import LmHead, Target, position_slices
from pocketllm.recover.run_log import Run
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import load_dense
from pocketllm.source.model_class import find_blocks

_IDS, _LOG_P, _FACTS = "teacher-ids.npy", "teacher-log-p.npy", "teacher.json"


class Teacher(Protocol):
    """The source of the distributions that distillation learns."""

    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        """The distributions at all positions of windows `ids` [B, T]; numbers [B] are those of the windows."""


class LiveTeacher:
    """The dense model itself, run on every batch."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = LmHead.of(model)

    @torch.no_grad()
    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        """Logits; if the head is plain, they are computed for some positions at a time."""
        if not self.head.is_plain:
            logits = self.head.logits(ids)
            return lambda part: logits[part]
        hidden = self.head.hidden(ids)
        weight, bias = self.head.parameters()
        return lambda part: linear(hidden[part].to(weight.dtype), weight, bias)


class CachedTeacher:
    """The k most likely tokens at every position of every window, computed once and stored in two files.

    Args:
        folder: holds `teacher-ids.npy` [windows, T, k] int32 and `teacher-log-p.npy` float32.

    Raises:
        ResumeError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.ids, self.log_p = (_mapped(folder / name) for name in (_IDS, _LOG_P))

    @staticmethod
    def is_made(folder: Path) -> bool:
        """Whether the files are complete."""
        return (folder / _LOG_P).is_file()

    @classmethod
    @torch.no_grad()
    def make(
        cls, folder: Path, teacher: LiveTeacher, windows: Tensor, k: int, progress: Callable[[float], None]
    ) -> None:
        """Run the teacher on all windows and store its k most likely tokens."""
        shape = (*windows.shape, k)
        device = teacher.model.device
        names = folder / _IDS, folder / "teacher-log-p.tmp.npy"
        ids = np.lib.format.open_memmap(names[0], mode="w+", dtype=np.int32, shape=shape)
        log_p = np.lib.format.open_memmap(names[1], mode="w+", dtype=np.float32, shape=shape)
        for number, window in enumerate(windows):
            target = teacher.target(torch.tensor([number]), window[None].to(device))
            for part in position_slices(len(window), teacher.model.config.get_text_config().vocab_size):
                logits = target(part)
                assert isinstance(logits, Tensor)
                top = logits.float().log_softmax(dim=1).topk(k, dim=1)
                ids[number, part] = top.indices.int().cpu().numpy()
                log_p[number, part] = top.values.cpu().numpy()
            progress((number + 1) / len(windows))
        ids.flush()
        log_p.flush()
        names[1].rename(folder / _LOG_P)

    def target(self, numbers: Tensor, ids: Tensor) -> Target:
        """(token ids, log-probabilities)."""
        rows = numbers.numpy()
        k = self.ids.shape[2]
        tokens = torch.from_numpy(self.ids[rows]).reshape(-1, k).long().to(ids.device)
        log_p = torch.from_numpy(self.log_p[rows]).reshape(-1, k).to(ids.device)
        return lambda part: (tokens[part], log_p[part])


def _mapped(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise damaged(path, path.parent, error) from error


def make_teacher(
    load: Callable[[], Any],
    run: Run,
    windows: tuple[Tensor, Tensor],
    top_k: int,
    progress: ProgressCallback,
    cache: TeacherCache | None = None,
) -> Teacher:
    """The dense model on every batch, or its `top_k` most likely tokens, computed once.

    Args:
        load: loads the dense model; called only if it has to run.
        windows: (training, validation).
        top_k: 0 runs the model on every batch.
        cache: where the tokens are kept for other students; None keeps them for this run alone.

    Raises:
        ConfigError, OutputError: as `TeacherCache.open`.
    """
    if not top_k:
        return LiveTeacher(load())
    folder = run.work.folder if cache is None else cache.folder
    with cache.open(run.state.is_main_process) if cache is not None else nullcontext():
        if run.state.is_main_process and not CachedTeacher.is_made(folder):
            CachedTeacher.make(
                folder,
                teacher=LiveTeacher(load()),
                windows=torch.cat(windows),
                k=top_k,
                progress=lambda share: progress(Event("teacher", share, f"{top_k} most likely tokens")),
            )
        run.state.wait_for_everyone()
    return CachedTeacher(folder)


@dataclass(frozen=True)
class TeacherCache:
    """A folder with the teacher's tokens, for several students of one teacher on one text.

    facts: everything that the tokens depend on, in plain JSON types.
    """

    folder: Path
    facts: dict[str, Any]

    @contextmanager
    def open(self, is_main: bool) -> Iterator[None]:
        """Create the folder or check that it fits; no other run fills it meanwhile.

        Raises:
            ConfigError: it holds tokens of another teacher, text or number of tokens; names what differs.
            OutputError: it cannot be read or written, or another process fills it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with locked(self.folder, is_main):
            try:
                self._check()
                if is_main:
                    write_json(self.folder / _FACTS, self.facts)
            except (OSError, ValueError) as error:
                raise self._unusable(error) from error
            yield

    def _check(self) -> None:
        path = self.folder / _FACTS
        found = read_object(path) if path.is_file() else self.facts
        differing = sorted(key for key in {*found, *self.facts} if found.get(key) != self.facts.get(key))
        if differing:
            both = "; ".join(
                f"{key}: {found.get(key)!r} there, {self.facts.get(key)!r} here" for key in differing
            )
            raise ConfigError(
                f"{self.folder}: holds the tokens of another teacher or text ({both}); name another folder with "
                "--teacher-cache"
            )

    def _unusable(self, error: Exception) -> OutputError:
        return OutputError(
            f"{self.folder}: cannot be used as a cache of the teacher ({reason_of(error)}); name another folder with "
            "--teacher-cache"
        )


def open_teacher(
    folder: Path,
    dtype: torch.dtype,
    device: Any,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
) -> Any:
    """Load the dense model of a folder.

    Args:
        scratch: leave its blocks on disk and read each of them when it runs; weights whose stored form differs
            from the one in memory are written here. None holds the model in memory.

    Raises:
        SourceError: it cannot be loaded.
    """
    place: dict[str, Any] = {}
    if scratch is not None:
        place = {"device_map": _blocks_on_disk(folder, device, trust_remote_code), "offload_folder": scratch}
    model = load_dense(folder, dtype, trust_remote_code, **place)
    return model if place else model.to(device)


def _blocks_on_disk(folder: Path, device: Any, trust_remote_code: bool) -> dict[str, Any]:
    """A device map that leaves the blocks on disk, and holds everything else on the device."""
    module: Any = open_dense(folder, trust_remote_code).model
    device = torch.device(device)
    device = "cpu" if device.type == "cpu" else str(device)  # as safetensors calls it
    found = find_blocks(module)
    if found is None:
        return {"": device}
    path, _ = found
    places, prefix = {path: "disk"}, ""
    for part in path.split("."):
        held = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        places |= {prefix + name: device for name in held if name != part}
        prefix, module = f"{prefix}{part}.", getattr(module, part)
    return places
