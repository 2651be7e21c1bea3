"""Registers PocketLLM's format with transformers as soon as transformers is imported, and imports neither before.

`pocketllm_startup.pth` in site-packages calls `start` whenever Python starts, so that every program loads
compressed models right; `import pocketllm` calls `register_when_imported`. Imports only what Python has loaded
anyway: it runs in programs that have nothing to do with language models.
"""

import sys

TYPE_CHECKING = False  # typing is not loaded when Python starts
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OFF = "POCKETLLM_NO_HOOK"  # set to 1, it keeps `start` from doing anything
started = False  # whether Python ran `start`, whatever came of it
_TARGET = "transformers.quantizers.auto"


def start() -> None:
    """What the line in site-packages runs."""
    import os

    global started
    started = True
    if os.environ.get(OFF) != "1":
        register_when_imported()


def register_when_imported() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import the plug-in, which registers; say so where that fails, since other models must still load."""
    try:
        import pocketllm.runtime.transformers_plugin  # noqa: F401
    except Exception as error:
        import logging

        logging.getLogger("pocketllm").warning(
            "transformers cannot load models compressed by pocketllm: %s: %s; "
            "install pocketllm-codec again, or uninstall it",
            type(error).__name__,
            error,
        )


class _Finder:  # not an importlib.abc.MetaPathFinder: importing that takes longer than all of this
    """Finds `transformers.quantizers.auto` as the other finders do, and adds a step after it has run."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname != _TARGET:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    def __init__(self, inner: "Any") -> None:
        self.inner = inner

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        module: ModuleType | None = self.inner.create_module(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        _register()
