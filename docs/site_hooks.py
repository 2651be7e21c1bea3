"""Hooks of mkdocs: pages of the repository's root join those of docs/, and links are those of the site.

A link to another file of the repository, which the site does not have, becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", **{name: name for name in ("FORMAT.md", "CHANGELOG.md", "CONTRIBUTING.md")}}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root."""
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages of the site."""
    source = {target: name for name, target in PAGES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source or f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def linked(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        found = place_of(path)
        if found is None:
            assert (ROOT / path).exists(), f"{page.file.src_uri}: no file {path}"
            return text if text.startswith("`") else f"{text} (`{path}`)" if text != path else f"`{path}`"
        return f"[{text}]({posixpath.relpath(found, here or '.')}{anchor or ''})"

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)#\s]+)(#[^)]*)?\)", linked, markdown)


def place_of(path: str) -> str | None:
    """Where the site has a file of the repository; None if it does not."""
    if path in PAGES:
        return PAGES[path]
    if not path.startswith("docs/"):
        return None
    inside = path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        inside = f"{inside}/README.md"
    return inside if (ROOT / "docs" / inside).is_file() else None
