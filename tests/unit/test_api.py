"""The public API: what is listed is there and documented; studies and reports are built on it alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pocketllm

SOURCE = Path(pocketllm.__file__).parent
LAZY = (
    "pocketllm",
    "pocketllm.text",
    "pocketllm.codec",
    "pocketllm.text",
    "pocketllm.source",
    "pocketllm.format",
    "pocketllm.plan",
    "pocketllm.calibrate",
    "pocketllm.compression",
    "pocketllm.runtime",
    "pocketllm.evaluate",
    "pocketllm.recover",
    "pocketllm.studies",
)
PUBLIC = (*LAZY, "pocketllm.config", "pocketllm.errors", "pocketllm.report")
INFRASTRUCTURE = (
    "pocketllm.files",
    "pocketllm.machine",
    "pocketllm.format.output",
    "pocketllm.format.workspace",
    "pocketllm.torch_state",
)
BUILT_ON_IT = ("studies", "report")


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
    with pytest.raises(AttributeError, match=f"{package} attribute nothing"):
        importlib.import_module(package).nothing  # noqa: B018


def test_importing_the_packages_is_light() -> None:
    code = f"import sys, {', '.join(LAZY)}; print(sorted({{'torch', 'transformers', 'faiss'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of what a module imports from pocketllm; None for the module itself."""
    for node in ast.walk(tree):
        found: list[tuple[str, str | None]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module or "", alias.name) for alias in node.names]
        yield from (each for each in found if each[0].split(".")[0] == "pocketllm")


def refused(own: str, module: str, name: str | None) -> bool:
    """Whether a module of the package `own` may not import that."""
    if module == own or module.startswith(f"{own}."):
        return False
    if name is None:
        return module != "pocketllm"
    if module == "pocketllm" and f"pocketllm.{name}" == own:
        return False
    if module in INFRASTRUCTURE:
        return name.startswith("_")
    return module not in PUBLIC or name not in importlib.import_module(module).__all__


@pytest.mark.parametrize(
    "path", [p for name in BUILT_ON_IT for p in sorted((SOURCE / name).rglob("*.py"))], ids=lambda p: p.name
)
def test_studies_and_reports_are_built_on_the_public_api(path: Path) -> None:
    own = f"pocketllm.{path.relative_to(SOURCE).parts[0]}"
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    wrong = [f"{module}.{name}" for module, name in found if refused(own, module, name)]
    assert wrong == [], f"{path.name}: not public; see docs/api.md"


def test_what_is_not_public_is_refused() -> None:
    own = "pocketllm.studies"
    for module, name in (
        ("pocketllm.codec.training", "fit"),
        ("pocketllm.codec", "training"),
        ("pocketllm.codec", "_fit"),
        ("pocketllm.format.workspace", "_partial"),
        ("pocketllm.codec", None),
        ("pocketllm.report.svg", "drawing"),
    ):
        assert refused(own, module, name)
    for module, name in (
        ("pocketllm.codec", "fit"),
        ("pocketllm", None),
        ("pocketllm.studies.show.study_page", "write"),
    ):
        assert not refused(own, module, name)


@pytest.mark.parametrize("path", sorted((SOURCE / "text").glob("*.py")), ids=lambda p: p.name)
def test_reading_text_depends_on_nothing_above_it(path: Path) -> None:
    for module, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert module.startswith(("pocketllm.text.", "pocketllm.config", "pocketllm.errors")), module


def test_the_infrastructure_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"{', '.join(f'`{name}`' for name in INFRASTRUCTURE[:-1])} and `{INFRASTRUCTURE[-1]}`" in page
