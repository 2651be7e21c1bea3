"""Puts the kernels, built in advance, into a wheel: whoever installs it needs no compiler.

Where no compiler is there or it fails, and with `POCKETLLM_COMPILE=0`, the wheel holds the sources alone and fits every
platform. The library contains all instruction sets and chooses when it runs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuiltKernels(BuildHookInterface):
    """Builds src/pocketllm/codec/kernels/packed.so for the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library to the wheel, and the platform to its name."""
        if version == "editable" or os.environ.get("POCKETLLM_COMPILE") == "0":
            return
        kernels = self._build_kernels()
        compiler = kernels.find_compiler()
        self.scratch = tempfile.TemporaryDirectory()
        target = Path(self.scratch.name) / "packed.so"
        try:
            kernels.build("packed", target, compiler or "no C++ compiler")
        except (OSError, subprocess.SubprocessError) as error:
            self.app.display_warning(f"the wheel holds the sources of the kernels alone: {error}")
            return
        build_data["force_include"][str(target)] = "pocketllm/codec/kernels/packed.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete what was built."""
        if hasattr(self, "scratch"):
            self.scratch.cleanup()

    def _build_kernels(self) -> Any:
        """build_kernels.py, which needs nothing but the standard library."""
        path = Path(self.root, "src/pocketllm/codec/kernels/build_kernels.py")
        spec = importlib.util.spec_from_file_location("build_kernels", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
