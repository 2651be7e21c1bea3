"""The structure of the package: imports go down the order of the rooms, without circles; one name, one module."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pocketllm

SOURCE = Path(pocketllm.__file__).parent
BASE = ("errors", "files", "cache", "machine", "torch_state", "ranks", "rank_join", "rank_watch")
ROOMS = (
    *("config", "text", "source", "codec", "format", "plan", "calibrate", "compression", "runtime"),
    *("integrations", "evaluate", "recover", "report", "studies", "cli"),
)
EXEMPT = ("pocketllm", "pocketllm.__main__")

MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def public(package: str) -> dict[str, str]:
    """Lazily imported name -> module, of one package."""
    stub = MODULES[package].with_suffix(".pyi")
    tree = ast.parse(stub.read_text(encoding="utf-8") if stub.is_file() else "")
    froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{package}.{node.module}" for node in froms for alias in node.names}


PUBLIC = {name: public(name) for name, path in MODULES.items() if path.name == "__init__.py"}


def home(name: str) -> str:
    """The module that a dotted name is, or is defined in."""
    while name not in MODULES:
        package, _, leaf = name.rpartition(".")
        name = PUBLIC.get(package, {}).get(leaf, package)
    return name


def deferred(node: ast.AST) -> bool:
    """Whether what is inside runs later than the module, or not at all."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def bound_packages(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the text, package whose public names are its attributes) of an import."""
    if isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name, alias.name) for alias in node.names if alias.name in PUBLIC)
    elif isinstance(node, ast.ImportFrom):
        found = ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        yield from ((local, name) for local, name in found if name in PUBLIC)


def imports(text: str) -> Iterator[tuple[str, bool]]:
    """(module of the package, whether it is imported as the module runs)."""
    tree = ast.parse(text)
    later = {inner for node in ast.walk(tree) if deferred(node) for inner in ast.walk(node)}
    packages = {local: name for node in ast.walk(tree) for local, name in bound_packages(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in packages:
            names = [f"{packages[ast.unparse(node.value)]}.{node.attr}"]
        yield from ((home(name), node not in later) for name in names if name.split(".")[0] == "pocketllm")


IMPORTS = {name: set(imports(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def room(module: str) -> str:
    """The folder that a module lies in, `base` for one beside the folders."""
    parts = module.split(".")
    return "base" if len(parts) < 2 or parts[1] in BASE else parts[1]


def rises(module: str, imported: str) -> bool:
    order = ("base", *ROOMS)
    return order.index(room(module)) < order.index(room(imported))


def test_every_folder_has_its_place() -> None:
    assert {room(name) for name in MODULES if name not in EXEMPT} - {"base"} <= set(ROOMS)


def test_no_import_goes_up() -> None:
    pairs = [(name, other) for name in sorted(IMPORTS.keys() - EXEMPT) for other, _ in IMPORTS[name]]
    found = {f"{name} imports {other}" for name, other in pairs if rises(name, other)}
    assert found == set()


@pytest.mark.parametrize("own", ("base", *ROOMS))
def test_no_circular_imports(own: str) -> None:
    inside = {name for name in MODULES if room(name) == own and name not in EXEMPT}
    TopologicalSorter(
        {name: {other for other, now in IMPORTS[name] if now and other in inside} for name in inside}
    ).prepare()  # raises CycleError, which names the modules


def test_no_two_modules_share_a_name() -> None:
    counts = Counter(path.stem for path in MODULES.values() if path.stem != "__init__")
    assert {name for name, count in counts.items() if count > 1} == set()


def test_the_table_for_contributors_is_in_this_order() -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \| \S", page, re.MULTILINE)
    assert rows == [name for name in ROOMS if (SOURCE / name / "__init__.py").is_file()]


def test_imports_are_found_wherever_they_are() -> None:
    text = """
import pocketllm
from typing import TYPE_CHECKING
from pocketllm.codec import codebook, fit
if TYPE_CHECKING:
    from pocketllm import perplexity
def later():
    import pocketllm.plan.target
    pocketllm.compress()
    import pocketllm as pl
    pl.load()
    from pocketllm import format as stored
    stored.verify()
    importlib.import_module("pocketllm.codec.kernels.triton")
    import_module("numpy")
"""
    assert set(imports(text)) == {
        ("pocketllm", True),
        ("pocketllm.codec.codebook", True),
        ("pocketllm.codec.training", True),
        ("pocketllm.evaluate.perplexity", False),
        ("pocketllm.plan.target", False),
        ("pocketllm.compression.pipeline", False),
        ("pocketllm", False),
        ("pocketllm.runtime.load_model", False),
        ("pocketllm.format", False),
        ("pocketllm.format.checkpoint", False),
        ("pocketllm.codec.kernels.triton", False),
    }
    assert rises("pocketllm.files", "pocketllm.config") and not rises("pocketllm.config", "pocketllm.files")
    assert rises("pocketllm.text.read", "pocketllm.codec.fit") and not rises(
        "pocketllm.cli", "pocketllm.text"
    )
