"""Calibration: the text as tokens, what an error in each matrix costs on it, and where measurements are kept.

Measurements are kept in a folder under a key of everything they depend on: model, text, settings, device,
threads, version. The default is the cache folder; a folder named by the user also keeps the inputs of the dense
model's blocks if they are used (`sequential` off).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import pocketllm
from pocketllm.cache import cache_folder
from pocketllm.calibrate.block_list import refusal
from pocketllm.calibrate.input_hessians import regularized_hessian
from pocketllm.calibrate.sensitivity import Sensitivity, measure
from pocketllm.codec.index_form import form_of
from pocketllm.config import CompressConfig
from pocketllm.errors import OutputError, SourceError, reason_of
from pocketllm.format.kept import read_kept
from pocketllm.format.output import check_parent
from pocketllm.plan.matrices import Matrix
from pocketllm.plan.selection import classify
from pocketllm.ranks import SOLO, Ranks
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.folder import read_tokenizer
from pocketllm.source.model_class import input_embedding
from pocketllm.text.default_texts import default_text
from pocketllm.text.read import read_calibration
from pocketllm.text.vocabulary import check_tokens, positions_of
from pocketllm.text.windows import calibration_windows

_HUB_CHARACTERS_PER_TOKEN = 32  # read from a data set on the Hub: several times what the windows need

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationText:
    """windows: [N, context] token ids. counts: [vocabulary] how often each token occurs in all of the text."""

    windows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Calibration:
    """windows: [N, context] token ids.

    kept: folder of the inputs of the dense model's blocks, or None. outputs: folder of the Hessians of the layers'
    outputs, or None. token_weights: [N, context] by matrix, 0 for tokens that were not measured.
    """

    windows: Tensor
    sensitivity: Sensitivity
    kept: Path | None
    outputs: Path | None
    token_weights: dict[str, Tensor]


def calibrate(
    source: DenseCheckpoint,
    text: CalibrationText,
    config: CompressConfig,
    device: str,
    folder: Path | None = None,
    scratch: Path | None = None,
    progress: Callable[[float], None] = lambda share: None,
    ranks: Ranks = SOLO,
    on_disk: bool = False,
) -> Calibration:
    """What an error in each matrix costs; measured, or read from an earlier run on the same model and text.

    Args:
        text: see `read_windows`. progress: called with the finished share.
        folder: where measurements are kept; None keeps small ones in the cache folder.
        scratch: where large ones are kept if `folder` is None; None if they are not needed.
        ranks: that measure together; the first writes. on_disk: see `measure`.
    """
    settings, windows = config.calibration, text.windows
    assert settings is not None
    matrices, _ = classify(source, config)
    _warn_of_few_tokens(windows, matrices)
    count = max(1, settings.sensitivity_tokens // windows.shape[1])
    measured = torch.arange(0, len(windows), max(1, len(windows) // count))[:count]
    chosen, names = windows[measured], [m.name for m in matrices]
    how: dict[str, Any] = {
        "damping": settings.damping,
        "seed": config.seed,
        "two_sided": settings.two_sided,
        "weigh_tokens": settings.weigh_tokens,
        "on_paths": form_of(config.codec).chosen_jointly,
    }
    key = _key(source, chosen, device, *how.values(), names, text_identity(text.counts))
    place, is_writable = _place(folder)
    path = place / f"sensitivity-{key}.safetensors"
    large = folder or scratch
    outputs = large / f"outputs-{key}" if large is not None and settings.two_sided else None
    found = _kept(path, outputs) if ranks.is_first else None
    if ranks.from_first(lambda: found is not None):
        ranks.sync_files(place, [path.name])
        found = found or Sensitivity.load(path)
    else:
        with _atomic_folder(outputs, ranks) as made:
            shared: dict[str, Any] = {"device": device, "progress": progress, "outputs": made, "ranks": ranks}
            found = measure(source, chosen, matrices, counts=text.counts, on_disk=on_disk, **how, **shared)
            found = _read_back(found, path if is_writable and ranks.is_first else None)
    if outputs is not None:
        ranks.sync_folder(outputs)
    kept = None
    if folder is not None and not settings.sequential:
        inside = [m.name for m in matrices if m.in_blocks]
        kept = folder / f"inputs-{_key(source, windows, device, inside, key)}"
    return _calibration(windows, found, measured, kept, outputs)


def _warn_of_few_tokens(windows: Tensor, matrices: list[Matrix]) -> None:
    widest = max((m.columns for m in matrices if not m.in_tower), default=0)
    if windows.numel() < widest:
        logger.warning(
            "calibration: %d tokens are fewer than the widest layer has inputs (%d); its Hessian is "
            "completed with uncorrelated inputs. Give more text",
            windows.numel(),
            widest,
        )


def _calibration(
    windows: Tensor, found: Sensitivity, measured: Tensor, kept: Path | None, outputs: Path | None
) -> Calibration:
    """The calibration on all windows from measurements on some. measured: numbers of those."""
    tokens = len(measured) * windows.shape[1]
    if tokens < len(found.head_hessian):
        found = replace(found, head_hessian=regularized_hessian(found.head_hessian * tokens, tokens))
    weights = {}
    for name, known in found.token_weights.items():
        weights[name] = torch.zeros(windows.shape)
        weights[name][measured] = known.float()
    return Calibration(windows, found, kept, outputs, weights)


def _place(folder: Path | None) -> tuple[Path, bool]:
    """The folder of small measurements, and whether it can be written: known before anything is measured.

    Raises:
        OutputError: a folder that the user has named cannot be written. The cache is only a convenience: a
            warning is enough there.
    """
    place = folder or cache_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        check_parent(place / "measured", "folder for the measurements")
    except (OSError, OutputError) as error:
        if folder is not None:
            raise OutputError(
                f"{folder}: cannot be written ({reason_of(error)}); choose another folder for the measurements"
            ) from error
        logger.warning(
            "%s: the cache cannot be written (%s): measurements will not be available to the next run; "
            "set POCKETLLM_CACHE to a writable folder",
            *(place, reason_of(error)),
        )
        return place, False
    return place, True


def _read_back(found: Sensitivity, path: Path | None) -> Sensitivity:
    """Write measurements and read them back, so that this run computes with the same bits as a later one."""
    with tempfile.TemporaryDirectory() as scratch:
        place = path or Path(scratch) / "measured.safetensors"
        found.save(place)
        return Sensitivity.load(place)


def _kept(path: Path, outputs: Path | None) -> Sensitivity | None:
    """The measurements of an earlier run; None if a part is missing or damaged, which is then removed."""
    if not path.exists() or (outputs is not None and not outputs.is_dir()):
        return None
    file = path
    try:
        for file in () if outputs is None else sorted(outputs.iterdir()):
            read_kept(file)
        file = path
        return Sensitivity.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: damaged (%s); measured again", file, reason_of(error))
        path.unlink(missing_ok=True)
        if outputs is not None:
            shutil.rmtree(outputs)
        return None


@contextmanager
def _atomic_folder(folder: Path | None, ranks: Ranks = SOLO) -> Iterator[Path | None]:
    """A temporary folder of this rank; that of the first is renamed when complete, unless another run was faster."""
    if folder is None:
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    filled = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for left in folder.parent.glob(f"{folder.name}.*.partial") if ranks.is_first else ():
        if not _is_running(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    ranks.wait()  # ranks on other machines are not running on this one
    filled.mkdir()
    try:
        yield filled
        try:
            if ranks.is_first:
                filled.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(filled, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another process has created it
        return True
    return True


def _key(source: DenseCheckpoint, windows: Tensor, device: str, *facts: object) -> str:
    identity = (source.fingerprint(), pocketllm.__version__, device, torch.get_num_threads(), *facts)
    return hashlib.sha256(repr(identity).encode() + windows.numpy().tobytes()).hexdigest()[:16]


def read_windows(source: DenseCheckpoint, config: CompressConfig) -> CalibrationText | None:
    """The calibration text: random windows of it and the frequencies of its tokens; None without calibration.

    Raises:
        SourceError: a text or the tokenizer cannot be read, or does not fit the model; too little text.
        ConfigError: the model has no single token embedding.
    """
    settings = config.calibration
    if settings is None:
        return None
    embedding: Any = input_embedding(source.model)
    if embedding is None:
        raise refusal(source.model, "has no single token embedding")
    tokenizer = _tokenizer(source)
    characters = _HUB_CHARACTERS_PER_TOKEN * settings.tokens
    texts = [read_calibration(place, characters, tokenizer) for place in settings.texts] or [default_text()]
    positions = positions_of(source.model.config) or settings.context
    context = min(settings.context, positions)
    windows, counts = calibration_windows(tokenizer, texts, settings.tokens, context, config.seed)
    check_tokens(source.model, windows)
    rows = embedding.weight.shape[0]
    return CalibrationText(windows, pad(counts[:rows], (0, max(0, rows - len(counts)))))


def _tokenizer(source: DenseCheckpoint) -> Any:
    def unusable(reason: str) -> SourceError:
        return SourceError(
            f"{source.folder}: calibration needs the model's tokenizer, which cannot be read ({reason}); "
            "add its files (tokenizer.json), or use a preset without calibration (lookup-8x)"
        )

    try:
        made = read_tokenizer(source.folder, source.trust_remote_code)
    except SourceError as error:
        raise unusable(reason_of(error.__cause__ or error)) from error
    # Some classes build a tokenizer without tokens if files are missing.
    if made is None or not set(made.get_vocab()) - set(made.all_special_tokens):
        raise unusable("it has no tokens")
    return made


def text_identity(tokens: Tensor) -> str:
    """Identity of token ids or counts."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
