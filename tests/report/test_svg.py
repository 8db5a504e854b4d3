import csv
import io
from xml.etree import ElementTree

import pytest

from harness.report.svg import Axis, Figure, Series, csv_text, draw, rulers, tick_text


def figure(x: Axis, y: Axis, *points: tuple[float, float], name: str = "one") -> Figure:
    columns = tuple(zip(*points, strict=True))
    return Figure("f", "A <title>", x, y, (Series(name, name, (0,), 0, "line", *columns),))


def test_ticks_by_hand():
    _, y = rulers(figure(Axis("x"), Axis("y"), (0, 23.5), (1, 97.0)))
    assert (y.low, y.high, y.ticks) == (20, 100, (20, 40, 60, 80, 100))
    x, _ = rulers(figure(Axis("x"), Axis("y"), (1, 0), (90, 1)))
    assert (x.low, x.high, x.ticks) == (1, 90, (20, 40, 60, 80))
    x, _ = rulers(figure(Axis("kn", scale="log2"), Axis("y"), (64, 0), (65536, 1)))
    texts = [tick_text(tick, "log2") for tick in x.ticks]
    assert texts == ["64", "128", "256", "512", "1k", "2k", "4k", "8k", "16k", "32k", "64k"]
    _, y = rulers(figure(Axis("x"), Axis("lr", scale="log10"), (0, 3.2), (1, 0.0032)))
    assert y.ticks == pytest.approx((0.001, 0.01, 0.1, 1, 10))
    _, y = rulers(figure(Axis("x"), Axis("y"), (0, 0.0), (1, 0.0)))  # no range at all
    assert y.low < 0 < y.high


def test_a_point_lies_where_the_ruler_says():
    x, y = rulers(figure(Axis("x"), Axis("y"), (0, 0), (10, 50)))
    assert (x(0), x(5), x(10)) == (50, (50 + 504) / 2, 504)
    assert (y(0), y(50)) == (330 - 44, 30) and y(25) == (286 + 30) / 2
    log = rulers(figure(Axis("x"), Axis("y", scale="log10"), (0, 1), (1, 100)))[1]
    assert log(10) == pytest.approx((286 + 30) / 2)


def test_a_file_is_whole_xml_with_title_legend_and_style_and_escapes_names():
    name = '<b> & "quoted"'
    text = str(draw(figure(Axis("x"), Axis("y"), (0, 1), (1, 2), name=name), standalone=True))
    root = ElementTree.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.findtext("s:title", "", space) == "A <title>"
    assert name in [element.text for element in root.iterfind(".//s:text", space)]
    assert root.find("s:style", space) is not None


def test_csv_has_the_points_and_the_ends_of_error_bars():
    bars = Series("a, b", "a", (0,), 0, "dot", (256.0,), (23.5,), (23.4,), (23.6,))
    plain = Series("c", "c", (1,), 1, "line", (1.0, 2.0), (3.0, 4.0))
    found = csv_text(Figure("f", "t", Axis("kn"), Axis("error", "%"), (bars, plain)))
    assert [*csv.reader(io.StringIO(found))] == [
        ["series", "kn", "error (%)", "low", "high"],
        ["a, b", "256.0", "23.5", "23.4", "23.6"],
        ["c", "1.0", "3.0", "", ""],
        ["c", "2.0", "4.0", "", ""],
    ]
