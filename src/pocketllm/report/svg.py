"""matplotlib figures as SVG inside a page: with its colours, its fonts and unique ids.

Charts are drawn in stand-in colours (`INK`, `MUTED`, …), which become CSS variables; so they follow the
page's light or dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pocketllm.errors import ExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, FIRST, SECOND = (f"#01020{n}" for n in range(3, 8))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", FIRST: "first", SECOND: "second"}
POINTS = 72
WIDTH = 330  # points; a phone of 360 pixels shows them about one to one


def need_matplotlib(extra: str = "report") -> None:
    """Check before any work that matplotlib is installed. Provisional.

    Args:
        extra: the extra to name, which installs it.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            f"pictures need matplotlib; install it with: pip install 'pocketllm-codec[{extra}]'"
        ) from error


@contextmanager
def drawing(ink: str = INK, muted: str = MUTED) -> Iterator[None]:
    """The matplotlib settings of every picture. Provisional.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib

    settings: Any = {  # matplotlib types the keys, version by version
        "svg.fonttype": "none",
        "svg.hashsalt": "pocketllm",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": ink,
        "axes.edgecolor": LINE if ink == INK else muted,
        "axes.labelcolor": ink,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float) -> Figure:
    """An empty figure, `WIDTH` points wide and `height` points high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / POINTS, height / POINTS), layout="constrained", facecolor="none")


def png_and_svg(figure: Figure, dpi: int) -> tuple[bytes, bytes]:
    """The figure in both forms; the same figure gives the same bytes. Provisional."""
    found = []
    for form, metadata in (("png", None), ("svg", {"Date": None})):
        raw = io.BytesIO()
        figure.savefig(raw, format=form, dpi=dpi, metadata=metadata)
        found.append(raw.getvalue())
    return found[0], found[1]


def inline(figure: Figure, name: str) -> str:
    """The figure as an element of a page: `<svg viewBox=…>` with ids that begin with `name`."""
    raw = io.BytesIO()
    figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
    text = raw.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf"<svg \1 {_HIDDEN}>", text, count=1)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r" id=\"([^\"]*)\"", lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = text.replace(' xlink:href="', ' href="').replace(' href="#', f' href="#{name}-')
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


_HIDDEN = 'aria-hidden="true" focusable="false"'
