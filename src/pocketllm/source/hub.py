"""Models on the Hugging Face Hub: `owner/name`, or `owner/name@revision` for a branch, tag or commit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pocketllm.errors import SourceError, reason_of
from pocketllm.files import real_path
from pocketllm.source.model_files import OTHER_WEIGHTS, PICKLES

HUB_IGNORED = [*PICKLES, *OTHER_WEIGHTS, "original/*", "*/*.safetensors"]
"""What is not fetched from the hub: what `companions` leaves, and the weights of other models."""
LOG_IN = "log in (`hf auth login`, or a token in HF_TOKEN)"


def split_hub_id(name: str) -> tuple[str, str | None] | None:
    """(Hub id, revision or None) of a name that can be a Hub id; None for any other.

    Example:
        >>> split_hub_id("owner/name@v1.0")
        ('owner/name', 'v1.0')
    """
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        return None
    return repository, revision or None


def download(name: str) -> Path:
    """The folder of a model in the Hub's cache, downloaded if it is not there.

    Args:
        name: as `split_hub_id` reads it.

    Raises:
        SourceError: not found, gated, not reachable, or not to be stored; says which.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_hub_id(name) or (name, None)
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=HUB_IGNORED))
    except (OSError, ValueError) as error:  # errors of huggingface_hub are of these types
        raise SourceError(_refusal(name, error)) from error
    except Exception as error:
        if "httpx" in type(error).__module__:
            raise SourceError(_unreachable(name, error)) from error
        raise


def downloaded(name: str) -> Path | None:
    """The folder of a model if an earlier `download` has fetched all of it."""
    from huggingface_hub import snapshot_download

    repository, revision = split_hub_id(name) or (name, None)
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, ignore_patterns=HUB_IGNORED, local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None


def folder_of(name: str | Path) -> Path:
    """The folder of a compressed model: a path as it is, a Hub id (that is no folder here) downloaded.

    Raises:
        SourceError: as `download`.
    """
    path = Path(name)
    if os.path.lexists(path) or split_hub_id(path.as_posix()) is None:
        return path
    return download(path.as_posix())


def name_of(folder: Path) -> str:
    """The name of a model's folder; of one in the Hub's cache, which is named by a commit, that of the model."""
    folder = real_path(folder)
    cached = folder.parent.parent.name.split("--")
    return cached[-1] if folder.parent.name == "snapshots" and len(cached) > 1 else folder.name


def _refusal(name: str, error: Exception) -> str:
    """Why a model cannot be had, and what to do."""
    from huggingface_hub import constants, errors

    repository, revision = split_hub_id(name) or (name, None)
    cause = error.__cause__ or error
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"{name}: a gated model; accept its terms at {page}, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the Hub has {repository}, but no revision {revision!r}; name a branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        missing = f"{_no_folder(name)}, and no such model on the Hub, or a private one"
        return f"{name}: {missing}; check the name, or {LOG_IN}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                f"{name}: {_no_folder(name)}, not (or not all of it) in the Hub's cache, and HF_HUB_OFFLINE forbids "
                "to download it; unset it, or give a local folder"
            )
        return _unreachable(name, cause)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (
            f"{name}: cannot be stored in the Hub's cache {constants.HF_HUB_CACHE} ({reason_of(error)}); point "
            "HF_HOME at a folder with more space"
        )
    return (
        f"{name}: {_no_folder(name)}, and the Hub lookup failed ({reason_of(error)}); "
        "check the name, your login and the connection"
    )


def _unreachable(name: str, error: BaseException) -> str:
    return (
        f"{name}: {_no_folder(name)}, and the Hub cannot be reached ({reason_of(error)}); check the connection, or "
        "give a local folder"
    )


def _no_folder(name: str) -> str:
    parent = Path(name).parent
    return f"no such folder in {parent}" if parent.is_dir() else "no local folder"
