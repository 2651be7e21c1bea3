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


class Isa(IntEnum):
    """Instruction sets that `packed` is compiled for; on ARM, `PLAIN` is NEON.

    AVX512 stands for the extensions that the hashed trellis needs (VBMI, VNNI, GFNI); all else stays with AVX2.
    """

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2


def library(name: str) -> ctypes.CDLL | None:
    """A library, or None where it cannot be built; `POCKETLLM_COMPILE=0` builds none and loads none."""
    return _loaded(name)[0]


def why_missing(name: str) -> str:
    """Why a library does not run here, after trying to build it; empty if it does."""
    return _loaded.__wrapped__(name)[1]


@functools.cache
def _loaded(name: str) -> tuple[ctypes.CDLL | None, str]:
    """A library, or None and the reason."""
    if os.environ.get("POCKETLLM_COMPILE") == "0":
        return None, "POCKETLLM_COMPILE=0 is set"
    shipped = FOLDER / f"{name}.so"
    if shipped.is_file():
        try:
            return ctypes.CDLL(str(shipped)), ""
        except OSError as error:
            logger.warning("%s cannot be loaded (%s); rebuilding it", shipped, error)
    compiler = find_compiler()
    if compiler is None:
        return None, "no C++ compiler found: install g++, or set CXX"
    identity = hashlib.sha256(RECIPES[name].identity() + compiler.encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{identity}.so"
    try:
        if not target.is_file():
            build(name, target, compiler)
        return ctypes.CDLL(str(target)), ""
    except (OSError, subprocess.SubprocessError) as error:
        reason = reason_of(error)
        if isinstance(error, subprocess.CalledProcessError):
            output = error.stderr.decode(errors="replace").strip()[-1000:]
            reason = f"{compiler} failed: {output or f'exit code {error.returncode}'}"
        logger.warning(
            "kernels `%s` could not be built by %s: %s; torch does their work, slower", name, compiler, reason
        )
        return None, reason


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
        raise ConfigError(
            f"POCKETLLM_ISA: got {wanted!r}, this processor supports plain to {found.name.lower()}"
        )
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
