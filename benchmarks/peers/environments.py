"""An environment for each peer, made from exact versions, and llama.cpp built from its package's sources."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from measure import measured

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
LLAMACPP = "llama-cpp-python==0.3.36"
TARGETS = ("llama-quantize", "llama-imatrix")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def environment(name: str, root: Path) -> Path:
    """The Python of environment `name`, made or brought up to requirements/NAME.txt first.

    Other packages have the project's versions, or those of requirements/NAME.constraints.txt.
    """
    requirements = HERE / "requirements" / f"{name}.txt"
    own = requirements.with_suffix(".constraints.txt")
    constraints = own if own.is_file() else CONSTRAINTS
    folder = root / f"env-{name}"
    python, stamp = folder / "bin" / "python", folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes() + constraints.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"{name}: installing {requirements.name}", flush=True)
        log = root / f"install-{name}.log"
        measured([sys.executable, "-m", "venv", folder], log)
        pip: list[str | Path] = [python, "-m", "pip", "install", "-c", constraints, "-r", requirements]
        measured(pip, log)
        stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """Every package of an environment."""
    command = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}


def llamacpp(python: Path, root: Path) -> dict[str, str]:
    """Fetch and build llama.cpp: its `source` and `build` folders, and what they were made from."""
    sources, build = root / "llamacpp-src", root / "llamacpp-build"
    if not list(sources.glob("*.tar.gz")):
        print(f"llama.cpp: downloading the sources of {LLAMACPP}", flush=True)
        pip: list[str | Path] = [python, "-m", "pip", "download", "--no-deps", "--dest", sources]
        measured([*pip, "--no-binary", "llama-cpp-python", LLAMACPP], root / "download-llamacpp.log")
    (archive,) = sources.glob("*.tar.gz")
    unpacked = sources / archive.name.removesuffix(".tar.gz")
    if not unpacked.is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(sources, filter="data")
    source = unpacked / "vendor" / "llama.cpp"
    if not all((build / "bin" / target).is_file() for target in TARGETS):
        print("llama.cpp: compiling (about ten minutes on two cores)", flush=True)
        log = root / "build-llamacpp.log"
        cmake = python.parent / "cmake"
        measured([cmake, "-S", source, "-B", build, *CMAKE_OPTIONS], log)
        measured([cmake, "--build", build, "-j", "2", "--target", *TARGETS], log)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"source": str(source), "build": str(build), "archive": archive.name, "sha256": digest}
