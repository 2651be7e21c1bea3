"""How a report draws and writes: numbers, charts, tables, text in pictures, the file."""

from __future__ import annotations

from pocketllm.report.charts import bars, histogram, picture
from pocketllm.report.heat_map import Grid, heat_panels, short_kinds
from pocketllm.report.tables import Table, short


def test_numbers() -> None:
    assert [short(v) for v in (None, 0.0, 3.98123, 0.0116, 1234.0, 2e-7, 99.96)] == [
        "–",
        "0",
        "3.98",
        "0.0116",
        "1234",
        "2.00e-07",
        "100.0",
    ]


def test_short_kinds() -> None:
    assert short_kinds(["self_attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_kinds(["attn.proj", "mlp.proj"]) == ["attn.proj", "mlp.proj"]
    assert short_kinds([]) == [] and short_kinds(["a", "a"]) == ["a", "a"]


def heat_map(grid: Grid, kinds: list[str]) -> list[str]:
    return [picture(panel, "h") for panel in heat_panels(grid, kinds, "nmse")]


def test_a_heat_map_of_many_kinds_is_cut() -> None:
    kinds = [f"kind{n}" for n in range(17)]
    pictures = heat_map([[0.1 * n + 0.01 for n in range(17)], [None] * 17], kinds)
    assert len(pictures) == 3 and "kind16" in pictures[2] and "–" in pictures[0]
    assert heat_map([[None]], ["kind"]) == []
    assert "nmse, thousandths" in heat_map([[5e-4, 0.2]], ["a", "b"])[0]
    assert heat_map([[0.0, 0.0]], ["a", "b"]) and heat_map([[1e-5, 1.0]], ["a", "b"])


def test_a_scale_of_colours_says_how_it_runs() -> None:
    (linear,) = heat_map([[0.5, 0.9]], ["a", "b"])
    assert "logarithmic" not in linear
    assert all(f">{tick}<" in linear for tick in ("0.50", "0.60", "0.70", "0.80", "0.90"))
    (wide,) = heat_map([[0.01, 100.0]], ["a", "b"])
    assert "nmse; logarithmic scale" in wide
    assert all(f">{tick}<" in wide for tick in ("0.010", "0.10", "1.0", "10", "100"))


def test_a_histogram_has_axes() -> None:
    drawn = picture(histogram([-1.0, 0.0, 1.0], [0.25, 0.75], [0.5, 0.5]), "h")
    assert ">weight<" in drawn and ">share per bin<" in drawn and ">40 %<" in drawn


def test_tables_know_how_wide_they_are() -> None:
    def table(columns: int, words: int = 1, cell: str = "3.14") -> Table:
        return Table("t", ("what", *["number"] * (columns - 1)), [(cell,) * columns], words)

    assert not table(3).may_scroll and not table(3).wide
    assert table(6).may_scroll and not table(6).wide
    assert table(9).may_scroll and table(9).wide
    long = "a row of many short words which may be broken"
    assert not table(1, cell=long).may_scroll and table(1, words=0, cell=long).may_scroll
    assert not Table("empty", ("a",), []).may_scroll


def test_text_in_a_picture_is_text() -> None:
    drawn = picture(bars(["<script>$x$</script>"], [0.0], ["a & b"]), "b")
    assert "&lt;script&gt;$x$&lt;/script&gt;" in drawn and "a &amp; b" in drawn
    assert "var(--first)" in drawn and "#0102" not in drawn
