"""Prepare a compressed folder for the Hub and upload it: the model card with measured values, one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pocketllm.errors import ConfigError, FormatError, OutputError, PocketError, reason_of
from pocketllm.files import files_below, need_regular
from pocketllm.format.checkpoint import REPORT_NAME, read_report, verify
from pocketllm.format.model_card import CARD_NAME, PLACEHOLDER, Figure, card_text, dense_card
from pocketllm.format.output import output_error
from pocketllm.format.rewrite import report_bytes
from pocketllm.format.trust import NOT_READ
from pocketllm.source.hub import LOG_IN


def write_card(folder: Path, figures: Sequence[Figure] = (), base_model: str | None = None) -> Path:
    """Rewrite the model card of a compressed model; the sizes in its report count it.

    Args:
        figures: measured values to show.
        base_model: Hub id of the dense model, where the report names a local folder.

    Returns:
        The file.

    Raises:
        FormatError: not a compressed model, or one whose README.md has a checksum; README.base.md is no file.
        OutputError: it cannot be written. ConfigError: base_model is not an id on the Hub.
    """
    if base_model is not None:
        _need_hub_id("base_model", base_model)
    report, path = read_report(folder), folder / CARD_NAME
    if CARD_NAME in report["files"]:
        raise FormatError(
            f"{path}: belongs to the dense model and has a checksum (an early version wrote the folder); compress the "
            "model again to get a model card"
        )
    dense = dense_card(folder, report)
    if dense is not None:
        need_regular(dense, FormatError)
    text = card_text(report, dense, base_model=base_model, figures=figures).encode()
    try:
        _replace(folder / REPORT_NAME, report_bytes(report, len(text)))
        _replace(path, text)
    except OSError as error:
        raise output_error(folder, error) from error
    return path


def _replace(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_push(repository: str) -> None:
    """Check before the work that a model can be pushed there.

    Raises:
        ConfigError: not a name for a repository.
        OutputError: no login, no connection, or another kind of model is there.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = _api(repository)
    with _refusals(repository):
        api.whoami()
        with suppress(RepositoryNotFoundError):  # it will be made
            _check_replaceable(repository, _stored(api, repository))


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a compressed model to the Hub in one commit; files of an earlier compressed model there are replaced.

    Args:
        repository: `owner/name`; created if it is not there. private: create it as a private one.

    Returns:
        Address of the commit.

    Raises:
        FormatError: not a compressed model, or damaged.
        ConfigError: not a name for a repository.
        OutputError: the Hub refuses, cannot be reached, or has another kind of model under that name.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _api(repository)
    verify(folder)
    names = list(files_below(folder, FormatError))
    for name in names:
        need_regular(folder / name, FormatError)
    with _refusals(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        stored = _stored(api, repository)
        _check_replaceable(repository, stored)
        stale = [name for name in stored if name not in names and not _is_document(name)]
        operations: list[Any] = [
            CommitOperationAdd(name, _content(folder / name, repository)) for name in names
        ]
        operations += [CommitOperationDelete(name) for name in stale]
        bpw = read_report(folder)["bpw_matrices"]
        message = f"Compressed to {bpw:.2f} bits per weight by pocketllm"
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def _need_hub_id(argument: str, name: str) -> None:
    if not re.fullmatch(r"[\w.-]{1,48}/[\w.-]{1,96}", name, re.ASCII):
        raise ConfigError(f"{argument}: got {name!r}, wanted OWNER/NAME, an id on the Hub")


def _api(repository: str) -> Any:
    """A client for a repository.

    Raises:
        ConfigError: not a name for one.
    """
    from huggingface_hub import HfApi

    _need_hub_id("push", repository)
    return HfApi()


def _stored(api: Any, repository: str) -> list[str]:
    return [str(name) for name in api.list_repo_files(repository)]


def _check_replaceable(repository: str, stored: Sequence[str]) -> None:
    """Raises OutputError if a repository has files that no compressed model has put there."""
    other = [name for name in stored if not _is_document(name)]
    if other and REPORT_NAME not in stored:
        raise OutputError(
            f"{repository}: has files on the Hub ({other[0]}) and is not a compressed model; choose another name"
        )


def _is_document(name: str) -> bool:
    leaf = name.rsplit("/", 1)[-1].lower()
    return leaf.startswith(".") or any(fnmatch(leaf, pattern) for pattern in NOT_READ)


def _content(path: Path, repository: str) -> str | bytes:
    """What is uploaded of a file: the model card names its repository."""
    if path.name != CARD_NAME:
        return str(path)
    return path.read_text(encoding="utf-8").replace(PLACEHOLDER, repository).encode()


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn what the Hub or the connection refuses into an error that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise OutputError(f"{repository}: pushing requires a login; {LOG_IN}") from error
    except errors.OfflineModeIsEnabled as error:
        raise OutputError(
            f"{repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"
        ) from error
    except errors.HfHubHTTPError as error:
        denied = error.response.status_code in (401, 403)
        advice = f"check that your token may write to it, or {LOG_IN}" if denied else "try again later"
        raise OutputError(
            f"{repository}: the Hub refused the request ({reason_of(error)}); {advice}"
        ) from error
    except PocketError:
        raise
    except Exception as error:  # whatever a transfer comes upon
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        what = "the Hub cannot be reached" if "httpx" in type(cause).__module__ else "the upload failed"
        raise OutputError(
            f"{repository}: {what} ({reason_of(cause)}); check the connection and push again"
        ) from error
