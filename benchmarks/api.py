"""Write the tables of docs/api.md: the public names of each package, with the first line of their docstrings.
Names that only studies and reports use are marked as provisional.

python benchmarks/api.py            # write
python benchmarks/api.py --check    # fail if the page does not match the code
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
SOURCE = Path(__file__).parent.parent / "src" / "pocketllm"
PROVISIONAL = "Provisional."
BUILT_ON_IT = ("pocketllm.studies", "pocketllm.report")
PACKAGES = (
    "pocketllm",
    "pocketllm.config",
    "pocketllm.errors",
    "pocketllm.text",
    "pocketllm.codec",
    "pocketllm.source",
    "pocketllm.format",
    "pocketllm.plan",
    "pocketllm.calibrate",
    "pocketllm.compression",
    "pocketllm.runtime",
    "pocketllm.evaluate",
    "pocketllm.recover",
    "pocketllm.report",
    "pocketllm.studies",
)


def described(package: str) -> dict[str, str]:
    """Public name -> the first line of its docstring.

    Raises:
        LookupError: a name has none.
    """
    module, found = importlib.import_module(package), {}
    for name in module.__all__:
        if name == "__version__":
            continue
        value = getattr(module, name)
        text = (
            value.__doc__
            if inspect.isroutine(value) or inspect.isclass(value)
            else _of_constant(module, name)
        )
        if not text or text.startswith(f"{name}("):  # what dataclasses write where nobody has
            raise LookupError(f"{package}.{name}: has no docstring")
        found[name] = text.strip().splitlines()[0]
    return found


def _of_constant(module: ModuleType, name: str) -> str | None:
    """The string below a constant, in the module within that sets it."""
    assert module.__file__ is not None
    file = Path(module.__file__)
    for path in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for statement, below in itertools.pairwise(body):
            targets = (
                statement.targets
                if isinstance(statement, ast.Assign)
                else [getattr(statement, "target", None)]
            )
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                return str(below.value.value) if is_text else None  # type: ignore[attr-defined]
    return None


def provisional(package: str) -> set[str]:
    """The public names that no package uses but studies and reports, which may change with them."""
    module, users = importlib.import_module(package), dict[str, set[str]]()
    if package == "pocketllm":
        return set()
    homes = {name: getattr(getattr(module, name), "__module__", package) for name in module.__all__}
    for path in sorted(SOURCE.rglob("*.py")):
        user = ".".join(path.relative_to(SOURCE.parent).parts[:2]).removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for alias in node.names if isinstance(node, ast.ImportFrom) and user != package else []:
                is_it = node.module == package or node.module == homes.get(alias.name)
                if is_it or (node.module or "").startswith(f"{package}."):
                    users.setdefault(alias.name, set()).add(user)
    stable = set(importlib.import_module("pocketllm").__all__)
    return {n for n in homes if n not in stable and users.get(n) and users[n] <= set(BUILT_ON_IT)}


def page() -> str:
    """The page with its tables renewed."""
    parts = ["<!-- api:begin -->"]
    for package in PACKAGES:
        marked = provisional(package)
        lines = {
            name: f"{line} {PROVISIONAL}" if name in marked and not line.endswith(PROVISIONAL) else line
            for name, line in described(package).items()
        }
        rows = [f"| `{name}` | {_cell(line)} |" for name, line in lines.items()]
        parts += [f"## `{package}`", "\n".join(["| name | what it is |", "| --- | --- |", *rows])]
    body = "\n\n".join([*parts, "<!-- api:end -->"])
    before = PAGE.read_text(encoding="utf-8")
    return re.sub("<!-- api:begin -->.*<!-- api:end -->", lambda _: body, before, flags=re.DOTALL)


def _cell(line: str) -> str:
    """A docstring's line as Markdown that shows just these characters; names stay code."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_|<\[\]])", r"\\\1", p) for p in parts)


def main() -> int:
    """The exit code."""
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != wanted:
        print(f"{PAGE}: does not match the code; run python benchmarks/api.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
