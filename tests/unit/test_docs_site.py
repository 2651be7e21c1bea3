"""The site of the docs builds in strict mode: links and anchors lead somewhere, every page has a place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` builds the site")

ROOT = Path(__file__).parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


def test_the_site_builds(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="calibration.html"' in index and 'href="FORMAT.html"' in index


def test_a_broken_anchor_and_a_page_without_a_place_fail(tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml", "README.md", "FORMAT.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("*.py"))
    for name in ("src", "tests", ".ci"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "docs" / "lost.md").write_text("[there](hub.md#no-such-place)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "no-such-place" in done.stderr and "lost.md" in done.stderr


def test_links_out_of_the_docs() -> None:
    """Pages of the root are pages of the site; other files are named; a missing one is an error."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_hooks
    finally:
        sys.path.pop(0)

    def shown(text: str, page: str = "hub.md") -> str:
        found = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return str(site_hooks.on_page_markdown(text, found, None, None))

    assert shown("[the format](../FORMAT.md#tensors)") == "[the format](FORMAT.md#tensors)"
    assert shown("[studies](docs/studies/README.md)", "index.md") == "[studies](studies/README.md)"
    assert shown("[all](../../README.md#results)", "studies/README.md") == "[all](../index.md#results)"
    assert shown("[CI](../.ci/run), [x](https://a.b)") == "CI (`.ci/run`), [x](https://a.b)"
    assert shown("![plot](peers.svg)") == "![plot](peers.svg)"
    with pytest.raises(AssertionError, match=r"hub\.md: no file docs/nothing\.md"):
        shown("[x](nothing.md)")
