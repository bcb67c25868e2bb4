"""The drawings of an analysis: pictures, heat maps and charts show the values that they were given."""

import base64
import itertools
from xml.etree import ElementTree

import pytest
from analysis_records import decoded, picture_in
from hypothesis import given
from hypothesis import strategies as st

from scionlm.report.analysis_chart import LayerChart, Line, ceiling, layer_chart
from scionlm.report.heatmap import HeatMap, Tone, heat_map
from scionlm.report.png import data_address, png
from scionlm.report.svg import Caption

CAPTION = Caption("it", "A title", "What it shows.")


@given(
    st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.floats(-1, 2), min_size=n, max_size=n), min_size=1)),
)
def test_a_picture_holds_the_values(rows: list[list[float]]) -> None:
    want = [[round(255 * min(max(value, 0), 1)) for value in row] for row in rows]
    assert decoded(png(rows)) == want


def test_a_picture_is_of_rows_of_one_length() -> None:
    assert "//" not in data_address(b"\xff" * 300)
    assert base64.b64encode(b"\xff" * 300).count(b"//")  # or the line above would show nothing
    for rows in ([], [[]], [[0.0], [0.0, 1.0]]):
        with pytest.raises(ValueError, match="rows of one length"):
            png(rows)


def strengths(data: HeatMap, width: int = 880) -> list[float]:
    root = ElementTree.fromstring(heat_map(CAPTION, width, data))
    return [float(rect.get("opacity", "")) for rect in root.iter("rect") if rect.find("title") is not None]


def test_a_cell_is_as_strong_as_its_value() -> None:
    linear = HeatMap([[0.0, 0.5, 1.0, None, -1.0]], ["a"], list("bcdef"), ("r", "c", "v"), Tone(0, 1), str)
    assert strengths(linear) == [0.04, 0.5, 1.0, 1.0]
    root = ElementTree.fromstring(heat_map(CAPTION, 880, linear))
    classes = [rect.get("class") for rect in root.iter("rect") if rect.find("title") is not None]
    assert classes == ["heat", "heat", "heat", "heat negative"]
    assert "c e, r a: none" in [title.text for title in root.iter("title")]
    logarithmic = HeatMap([[1.0, 10.0, 100.0]], ["a"], list("bcd"), ("r", "c", "v"), Tone(1, 100, True), str)
    assert strengths(logarithmic) == [0.04, 0.5, 1.0]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 30), (64, 80), (31, 31), (2, 5000)])
@pytest.mark.parametrize("width", [880, 430, 320])
def test_a_heat_map_of_any_size_stays_inside_its_drawing(rows: int, columns: int, width: int) -> None:
    values: list[list[float | None]] = [[float(i + k) for k in range(columns)] for i in range(rows)]
    names = [str(k) for k in range(max(rows, columns))]
    data = HeatMap(values, names[:rows], names[:columns], ("head", "layer", "rank"), Tone(0, 5000), str)
    root = ElementTree.fromstring(heat_map(CAPTION, width, data))
    _, _, wide, high = map(float, root.get("viewBox", "").split())
    for each in root.iter("rect"):
        x, y, w, h = (float(each.get(key, "")) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + w <= wide + 0.2
        assert y >= 0
        assert y + h <= high
    cells = sum(rect.find("title") is not None for rect in root.iter("rect"))
    assert cells in {0, rows * columns}
    if not cells:
        assert [len(row) for row in picture_in(root)] == [columns] * rows
    assert (cells > 0) == (rows * columns <= (8000 if width > 400 else 700))


def test_names_of_a_heat_map_do_not_overlap_and_leave_room_for_the_cells() -> None:
    names = ["\u4e2d" * 60, *(str(k) for k in range(63))]
    data = HeatMap([[1.0] * 80] * 64, names, [str(k) for k in range(80)], ("h", "l", "v"), Tone(0, 1), str)
    root = ElementTree.fromstring(heat_map(CAPTION, 320, data))
    bottom = max(float(text.get("y", "")) for text in root.iter("text") if text.get("text-anchor") == "end")
    across = sorted(
        float(text.get("x", ""))
        for text in root.iter("text")
        if text.get("text-anchor") == "middle" and (text.text or "").isdigit() and float(text.get("y", "")) > bottom
    )
    assert len(across) > 2
    assert all(right - left >= 14 for left, right in itertools.pairwise(across))
    (ground,) = [rect for rect in root.iter("rect") if rect.get("class") == "ground"]
    assert float(ground.get("width", "")) > 320 / 2


def test_few_large_values_leave_the_axis_and_are_named() -> None:
    values = [9.0, 1.0, 0.8, 0.9, 0.7, 0.9, 1.1, 1.0]
    assert ceiling(values) == 1.1
    assert ceiling([1.0] * 8) == 1.0
    assert ceiling([2.0, *[1.0] * 7]) == 2.0
    chart = LayerChart([Line("x", values)], [str(k) for k in range(8)], "y", bars=True, cut=True)
    root = ElementTree.fromstring(layer_chart(CAPTION, 880, 200, chart))
    assert "off the scale: 0 at 9.00" in [text.text for text in root.iter("text")]
    titles = [group.findtext("title") for group in root.iter("g")]
    assert titles[0] == "layer 0: 9.00"
    heights = [float(group.findall("rect")[0].get("height", "")) for group in root.iter("g")]
    assert heights[0] == max(heights)
    assert heights[7] / heights[3] == pytest.approx(1 / 0.9, rel=0.01)


def test_a_missing_value_breaks_a_line() -> None:
    chart = LayerChart([Line("x", [1.0, 2.0, None, 3.0, 4.0])], list("01234"), "y")
    root = ElementTree.fromstring(layer_chart(CAPTION, 880, 200, chart))
    (path,) = [each.get("d", "") for each in root.iter("path")]
    assert (path.count("M"), path.count("L")) == (2, 2)
