"""Quality against size and against operations: what is drawn, what is on the line, when there is nothing."""

import math
import re

from compared_folders import compared_run, pair
from hypothesis import given
from hypothesis import strategies as st

from scionlm.report.compare import compared
from scionlm.report.compare_charts import loss_chart, operations_matter
from scionlm.report.compare_page import compare_page
from scionlm.report.compare_pareto import Sized, _log_ticks, pareto, pareto_chart, sized

SIZES = st.lists(
    st.tuples(st.floats(1e3, 1e12), st.floats(0.5, 12)).map(lambda pair: Sized("m", pair[0], pair[1], "child")),
    min_size=1,
    max_size=12,
)


@given(SIZES)
def test_on_the_line_are_those_that_none_as_small_betters(models):
    line = pareto(models)
    assert min(models, key=lambda one: one.loss) in line
    for one in models:
        better = [other for other in models if other.loss < one.loss and other.cost <= 1.02 * one.cost]
        assert (one in line) == (not better)


@given(st.floats(1e2, 1e12), st.floats(1.01, 1e4), st.integers(3, 8))
def test_ticks_are_round_and_few(low, ratio, most):
    ticks = _log_ticks(low, low * ratio, most)
    assert len(ticks) <= most
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert ticks == sorted(ticks)
    for tick in ticks:
        mantissa = tick / 10 ** math.floor(math.log10(tick * 1.0000001))
        assert round(10 * mantissa, 6) == round(round(10 * mantissa))


def test_every_group_source_and_near_control_has_a_place(tmp_path):
    runs = [
        compared_run(tmp_path / "small", pair(4.0, 3.0), strategy="a", parameters=1_000_000),
        compared_run(tmp_path / "middle", pair(3.4, 3.0), strategy="b", parameters=2_000_000),
        compared_run(tmp_path / "worse", pair(4.5, 3.0), strategy="c", parameters=2_000_000),
        compared_run(tmp_path / "random", pair(6.0, 5.0), init="random", parameters=1_000_000),
        compared_run(tmp_path / "far", pair(60.0, 5.0), init="random", strategy="z", parameters=1_000_000),
    ]
    comparison = compared(runs)
    models = sized(comparison)
    assert [one.name for one in models] == ["source big", "middle", "small", "worse", "random"]
    assert [one.name for one in pareto(models)] == ["small", "middle", "source big"]
    picture = str(pareto_chart(comparison))
    assert "middle 2.0M, 3.200" in picture
    assert picture.count("marker child hollow") == 2  # worse, in both widths
    assert "Loss against size and speed" in compare_page(comparison, "sizes")


def test_one_size_is_not_drawn(tmp_path):
    runs = [
        compared_run(
            tmp_path / name, pair(4.0 + k, 3.0), strategy=name, source_nll={"prose": math.nan, "code": math.nan}
        )
        for k, name in enumerate("ab")
    ]
    comparison = compared(runs)
    assert pareto_chart(comparison) is None
    assert "Loss against size and speed" not in compare_page(comparison, "sizes")


def test_operations_are_drawn_where_a_token_costs_more_in_one_run(tmp_path):
    cheap = compared_run(tmp_path / "cheap", pair(4.0, 3.0), strategy="a", flops=1e12)
    dear = compared_run(tmp_path / "dear", pair(3.4, 3.0), strategy="b", flops=3e12)
    alike = compared_run(tmp_path / "alike", pair(3.4, 3.0), strategy="c", flops=1.05e12)
    assert operations_matter(compared([cheap, dear]))
    assert not operations_matter(compared([cheap, alike]))
    page = compare_page(compared([cheap, dear]), "dear")
    assert "The same losses over the operations spent" in page
    assert "The same losses over the operations spent" not in compare_page(compared([cheap, alike]), "alike")
    tokens, operations = (_ends(loss_chart(compared([cheap, dear]), over)[0]) for over in (False, True))
    assert tokens[0] == tokens[1]  # both end at the same token
    assert abs(operations[0] - operations[1]) > 100  # and at a third of the other's operations


def _ends(picture):
    """Return where the lines of the wide drawing end."""
    wide = str(picture).split("</svg>")[0]
    return [float(x) for x in re.findall(r'[ML]([\d.]+) [\d.]+(?=")', wide)]
