"""Shared libraries of the kernels in C++: built once by the system's compiler, kept in the cache, called by ctypes.

Two kinds. `packed` has every instruction set compiled in and chooses one when it is called, so it can be built in
advance and shipped. The others are built for this very processor (`-march=native`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from torch import Tensor

from pocketllm.cache import cache_folder
from pocketllm.errors import ConfigError

logger = logging.getLogger(__name__)

BUILD_SECONDS = 300
_FLAGS = ("-O3", "-std=c++17", "-Wno-psabi", "-shared", "-fPIC", "-fopenmp")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What a library is built of: source files, files that they include, and flags."""

    sources: tuple[str, ...]
    included: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def identity(self) -> bytes:
        """What the library depends on, but for the compiler."""
        texts = [(_FOLDER / name).read_bytes() for name in self.sources + self.included]
        native = _processor().encode() if "-march=native" in self.flags else b""
        return b"\0".join([repr((_FLAGS, self.flags)).encode(), native, *texts])


RECIPES = {
    "nearest": Recipe(("nearest.cpp",), flags=("-march=native",)),
    "matrix": Recipe(("matrix.cpp",), flags=("-march=native",)),
    # Without fused operations it computes exactly what torch does.
    "trellis": Recipe(("trellis.cpp",), flags=("-march=native", "-ffp-contract=off")),
    "packed": Recipe(
        ("packed_matmul.cpp", "hashed_matmul.cpp", "hashed_bands.cpp"),
        ("packed_rows.inc", "rotate.inc", "rotate_eight.inc", "hashed_layout.h"),
    ),
}


class Isa(IntEnum):
    """Instruction sets that `packed` is compiled for; on ARM, `PLAIN` is NEON.

    AVX512 stands for the extensions that the hashed trellis needs (VBMI, VNNI, GFNI); all else stays with AVX2.
    """

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2


def build(name: str, target: Path, compiler: str) -> None:
    """Compile a library of `RECIPES` into the file `target`.

    Raises:
        OSError, subprocess.SubprocessError: the compiler is missing or failed, or `target` cannot be written.
    """
    recipe = RECIPES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        sources = [str(_FOLDER / source) for source in recipe.sources]
        command = [compiler, *_FLAGS, *recipe.flags, *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
        built.replace(target)


def find_compiler() -> str | None:
    """The C++ compiler: `CXX`, `c++` or `g++`."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A library, or None where it cannot be built; `POCKETLLM_COMPILE=0` builds none and loads none."""
    if os.environ.get("POCKETLLM_COMPILE") == "0":
        return None
    shipped = _FOLDER / f"{name}.so"
    if shipped.is_file():
        try:
            return ctypes.CDLL(str(shipped))
        except OSError as error:
            logger.warning("%s cannot be loaded (%s); it is built again", shipped, error)
    compiler = find_compiler()
    if compiler is None:
        return None
    identity = hashlib.sha256(RECIPES[name].identity() + compiler.encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{identity}.so"
    try:
        if not target.is_file():
            build(name, target, compiler)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        logger.warning(
            "kernels `%s` could not be built by %s: %s; torch does their work, slower",
            name,
            compiler,
            said[-1000:] or error,
        )
        return None


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


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
