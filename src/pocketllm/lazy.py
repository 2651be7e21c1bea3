"""Names of a package that are imported when they are used (PEP 562): `import pocketllm` loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def exports(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    A name must not be that of a module in the package: once the module is imported, the name means that.

    Args:
        package: its `__name__`. homes: module, relative to the package (`.training`) or absolute -> the
            names that it defines.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home_of[name], package), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *home_of})

    return get, names
