"""How the shared libraries of the kernels in C++ are built; needs nothing but the standard library.

There are two kinds. `packed` has every instruction set compiled in and chooses one when it is called, so it can be
built in advance and shipped. The others are built for the current processor (`-march=native`).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

BUILD_SECONDS = 300
_FLAGS = ("-O3", "-std=c++17", "-Wno-psabi", "-shared", "-fPIC", "-fopenmp")
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What a library is built of: source files, files that they include, and flags."""

    sources: tuple[str, ...]
    included: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def identity(self) -> bytes:
        """Everything the library depends on except the compiler."""
        texts = [(FOLDER / name).read_bytes() for name in self.sources + self.included]
        native = _processor().encode() if "-march=native" in self.flags else b""
        return b"\0".join([repr((_FLAGS, self.flags)).encode(), native, *texts])


RECIPES = {
    "nearest": Recipe(("nearest.cpp",), flags=("-march=native",)),
    "matrix": Recipe(("matrix.cpp", "squares.cpp"), flags=("-march=native",)),
    # Without fused operations it computes exactly what torch does.
    "trellis": Recipe(("trellis.cpp", "ordered.cpp"), flags=("-march=native", "-ffp-contract=off")),
    "packed": Recipe(
        ("packed_matmul.cpp", "hashed_matmul.cpp", "hashed_rows.cpp", "hashed_many.cpp", "hashed_bands.cpp"),
        (
            "packed_rows.inc",
            "rotate.inc",
            "rotate_eight.inc",
            "number.h",
            "hashed_layout.h",
            "hashed_decode.h",
        ),
    ),
}


def build(name: str, target: Path, compiler: str) -> None:
    """Compile a library of `RECIPES` into the file `target`.

    Raises:
        OSError, subprocess.SubprocessError: the compiler is missing or failed, or `target` cannot be written.
    """
    recipe = RECIPES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        sources = [str(FOLDER / source) for source in recipe.sources]
        command = [compiler, *_FLAGS, *recipe.flags, *sources, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_SECONDS)
        built.replace(target)


def find_compiler() -> str | None:
    """The C++ compiler: `CXX`, `c++` or `g++`."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
