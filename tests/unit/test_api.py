"""The public API: what is listed is there and documented."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

LAZY = ("pocketllm", "pocketllm.codec", "pocketllm.model", "pocketllm.evaluate", "pocketllm.recover")
PUBLIC = (*LAZY, "pocketllm.config", "pocketllm.errors", "pocketllm.report", "pocketllm.studies")


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert not isinstance(value, ModuleType), f"{package}.{name} is a module"
        home = getattr(value, "__module__", "pocketllm")
        assert home.startswith("pocketllm"), f"{package}.{name} comes from {home}"
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", LAZY)
def test_no_public_name_is_that_of_a_module(package: str) -> None:
    """It would mean the module as soon as that is imported."""
    module = importlib.import_module(package)
    assert not set(module.__all__) & {found.name for found in pkgutil.iter_modules(module.__path__)}


@pytest.mark.parametrize("package", LAZY)
def test_other_names_are_refused(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018


def test_importing_the_packages_is_light() -> None:
    code = f"import sys, {', '.join(LAZY)}; print(sorted({{'torch', 'transformers', 'faiss'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
