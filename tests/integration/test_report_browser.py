"""The page of `pocketllm report` in a real browser, as a reader of it sees and works it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from pocketllm.report import html_report
from tests import reports
from tests.browser import HOW, LOOK, Browser, chromium, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=HOW)

SIZES = [(360, False), (360, True), (1200, False), (1200, True)]  # (pixels, dark)
BAD = """<!DOCTYPE html><body style="background: #fff"><p style="color: #8a8a8a">grey</p>
<p style="color: #8a8a8a; background: #000">grey on black</p><p style="opacity: 0.4">thin</p>
<svg width="200" height="100"><path d="M 0 0 H 60 V 60 H 0 z" style="fill: #004"/><text x="5" y="30">cell</text>
<text x="100" y="30" style="fill: #fff">white</text><text x="5" y="34">on it</text>
<path d="M 0 90 H 50" style="--first: #eee; fill: none; stroke: var(--first); stroke-width: 2"/></svg>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with chromium(str(find_chromium()), tmp_path_factory.mktemp("chromium") / "profile", 300) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """full: with everything on it; adapter: the same with an adapter; wide: many codebooks, little measured."""
    folder = reports.make(tmp_path_factory.mktemp("report"))
    found = {
        "full": reports.full_page(folder),
        "wide": html_report(folder / "moe", folder / "wide.html").output,
    }
    if importlib.util.find_spec("peft") is not None:
        found["adapter"] = reports.full_page(folder, reports.make_adapter(folder))
    return found


def opened(browser: Browser, page: Path, width: int, dark: bool = False) -> Any:
    """What `page_checks.js` says of the page with every table unfolded."""
    browser.open(page.as_uri(), width, dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    return browser.run(LOOK)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_all_can_be_read(width: int, dark: bool, browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        seen = opened(browser, page, width, dark)
        assert seen["texts"] > 300 and seen["shapes"] > 10
        assert not seen["faint"] and not seen["overlaps"]
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert all(reachable for _, reachable in seen["scrolled"])
        assert width == 360 or "Codebook usage" not in [caption for caption, _ in seen["scrolled"]]
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert not browser.messages
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_numbers_of_every_chart_are_beneath_it(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        figures = opened(browser, page, 1200)["figures"]
        assert len(figures) >= 4
        for figure in figures:
            assert figure["beneath"] and figure["labels"] and figure["rows"], figure["caption"]
            numbers = _numbers(figure)
            assert numbers or figure["rows"] > 10, figure["caption"]
            assert not [text for text in numbers if not _stands_in(text, figure)], figure["caption"]


def _numbers(figure: dict[str, Any]) -> list[str]:
    """Numbers that stand at or on what is drawn: in cells, and at the ends of bars; other charts have axes."""
    if figure["description"].startswith("Heat map"):
        return [text for text in figure["marks"] if text != "–"]
    ends = [label.split(", ")[-1] for label in figure["labels"]]
    are_bars = figure["description"].startswith("Bar chart")
    return [end for end in ends if are_bars and re.fullmatch(r"[\d.]+%?", end)]


def _stands_in(text: str, figure: dict[str, Any]) -> bool:
    """Whether a number is in the table, there perhaps with more digits, or not in thousandths."""
    if text in figure["cells"]:
        return True
    unit = 1e-3 if any("thousandths" in label for label in figure["labels"]) else 1.0
    digits = len(text.replace(".", "").lstrip("0"))
    return any(
        abs(float(cell) - unit * float(text)) <= 10 ** (1 - digits) * abs(float(cell))
        for cell in figure["cells"]
        if re.fullmatch(r"[\d.]+(e[-+]\d+)?", cell)
    )


def test_all_can_be_reached_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        opened(browser, page, 360)
        wanted = browser.run(_REACHABLE)
        browser.run("scrollTo(0, 0)")
        found = browser.tabbed(len(wanted) + 10)
        assert "skip" in found[0] and not set(wanted) - set(found)
        assert browser.run(
            "[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))"
        )
    browser.run(
        "window.scroller = [...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth)"
    )
    browser.run("scroller.focus()")
    browser.press("ArrowRight", 39)
    assert any(browser.run("scroller.scrollLeft > 0") for _ in range(500))  # it glides


_REACHABLE = """(() => {
  const all = [...document.querySelectorAll('*')];
  return all.filter(e => e.matches('a[href], summary') || e.matches('.scroll') && e.scrollWidth > e.clientWidth)
    .map(e => `${all.indexOf(e)} ${e.tagName} ${e.className}`);
})()"""


def test_what_cannot_be_read_is_found(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    browser.open((tmp_path / "bad.html").as_uri(), 360)
    seen = browser.run(LOOK)
    assert [words.split(":")[0] for words in seen["faint"] if "of 40" not in words] == [
        *("grey", "thin", "cell", "white", "on it"),
        "shape in undefined",
    ]
    assert seen["texts"] == 6 and seen["overlaps"] == ["cell | on it"]
