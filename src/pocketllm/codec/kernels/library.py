"""Shared libraries of the kernels in C++: shipped with the package, or built once and kept in the cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
from enum import IntEnum

from torch import Tensor

from pocketllm.cache import cache_folder
from pocketllm.codec.kernels.build_kernels import FOLDER, RECIPES, build, find_compiler
from pocketllm.errors import ConfigError, reason_of

logger = logging.getLogger(__name__)

LIBRARIES = tuple(RECIPES)


class Isa(IntEnum):
    """Instruction sets that `packed` is compiled for; on ARM, `PLAIN` is NEON.

    AVX512 stands for the extensions that the hashed trellis needs (VBMI, VNNI, GFNI); all else stays with AVX2.
    """

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A library, or None where it cannot be built; `POCKETLLM_COMPILE=0` builds none and loads none."""
    if os.environ.get("POCKETLLM_COMPILE") == "0":
        return None
    if (FOLDER / f"{name}.so").is_file():
        try:
            return _shipped(name)
        except OSError as error:
            logger.warning("%s.so cannot be loaded (%s); it is built again", FOLDER / name, error)
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return _built(name, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "kernels `%s` could not be built by %s: %s; torch replaces them and is slower",
            name,
            compiler,
            _said_by(error),
        )
        return None


def why_missing(name: str) -> str:
    """Why a library of `LIBRARIES` does not run here, after trying to build it; empty where it does."""
    if os.environ.get("POCKETLLM_COMPILE") == "0":
        return "POCKETLLM_COMPILE=0 is set"
    compiler = find_compiler()
    try:
        if (FOLDER / f"{name}.so").is_file():
            _shipped(name)
        elif compiler is None:
            return "no C++ compiler found: install g++, or set CXX"
        else:
            _built(name, compiler)
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {_said_by(error)}"
    except (OSError, subprocess.SubprocessError) as error:
        return reason_of(error)
    return ""


def _shipped(name: str) -> ctypes.CDLL:
    """The library that came with the package; OSError where there is none."""
    return ctypes.CDLL(str(FOLDER / f"{name}.so"))


def _built(name: str, compiler: str) -> ctypes.CDLL:
    """The library in the cache, built if it is not there; OSError or SubprocessError where that fails."""
    identity = hashlib.sha256(RECIPES[name].identity() + compiler.encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{identity}.so"
    if not target.is_file():
        build(name, target, compiler)
    return ctypes.CDLL(str(target))


def _said_by(error: Exception) -> str:
    """The first line that a compiler printed, or the error itself."""
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
    code = getattr(error, "returncode", None)
    return said[0] if said else reason_of(error) if code is None else f"exit code {code}"


def best_isa() -> Isa:
    """The best instruction set of this processor, or what `POCKETLLM_ISA` names (plain, avx2, avx512).

    Raises:
        ConfigError: `POCKETLLM_ISA` names none, or one that this processor lacks.
    """
    found = Isa.AVX512 if call("packed", "hashed_supported") else Isa(call("packed", "packed_isa"))
    wanted = os.environ.get("POCKETLLM_ISA")
    if not wanted:
        return found
    if wanted.upper() not in Isa.__members__ or Isa[wanted.upper()] > found:
        raise ConfigError(f"POCKETLLM_ISA: got {wanted!r}, this processor has plain to {found.name.lower()}")
    return Isa[wanted.upper()]


def hashed_runs() -> bool:
    """Whether the kernel for hashed trellises runs here."""
    return library("packed") is not None and best_isa() >= Isa.AVX512


def call(name: str, function: str, *arguments: Tensor | int | None) -> int:
    """Call a function of a library: tensors by address, None as a null pointer, integers as int64."""
    loaded = library(name)
    assert loaded is not None
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
    found = getattr(loaded, function)
    if found.argtypes is None:  # the first call declares what all others pass
        found.argtypes = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_void_p for a in arguments]
    return int(found(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)))
