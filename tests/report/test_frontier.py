"""The frontier of a comparison: who forgets and gains how much, who is beaten by none, who is recommended, and how."""

import itertools
import json
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import HOSTILE, Page, check_inert, check_page
from test_report import words as words_of

from report.compared_folders import compared_run, pair
from report.continual_folders import NEW, OLD, compared_continual, config, records
from report.run_folders import write_json
from scionlm.cli.compare import print_comparison
from scionlm.report import html as report_html
from scionlm.report import write_comparison
from scionlm.report.axes import text_width
from scionlm.report.collect import read_run
from scionlm.report.compare import compared
from scionlm.report.compare_frontier_plot import frontier_chart
from scionlm.report.placing import Box, Spot, place_labels
from scionlm.report.settings_read import rate_words, settings_of, share_words, source_label


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def point_of(record, name):
    return next(point for point in record["frontier"]["points"] if point["name"] == name)


def row_of(record, name):
    return next(row for row in record["rows"] if row["name"] == name)


def numbers(record):
    return [record[key] for key in ("forgetting", "adaptation", "net")]


def test_each_is_measured_from_its_source(root, tmp_path):
    items = [
        compared_continual(root / "low", 0.1, 0.3, recipe={"optimizer": {"lr": 1e-4}}),
        compared_continual(root / "high", 0.4, 0.6),
        compared_continual(root / "scratch", 2.0, -0.5, kind="scratch"),
    ]
    record = write_comparison(items, tmp_path / "out")
    frontier = record["frontier"]
    assert frontier["upstream"] == list(OLD)
    assert frontier["downstream"] == list(NEW)
    assert frontier["start"] == {
        "name": "org/base-30m",
        "upstream": pytest.approx(2.9),
        "downstream": pytest.approx(3.2),
    }
    for name, kept, gain in (("low", 0.1, 0.3), ("high", 0.4, 0.6), ("scratch", 2.0, -0.5)):
        assert numbers(point_of(record, name)) == pytest.approx([kept, gain, gain - kept])
        assert numbers(row_of(record, name)) == pytest.approx([kept, gain, gain - kept])
        assert row_of(record, name)["upstream"] == pytest.approx(2.9 + kept)
        assert row_of(record, name)["downstream"] == pytest.approx(3.2 - gain)
    assert [point["baseline"] for point in frontier["points"]] == [False, False, True]
    assert record["source"]["upstream"] == pytest.approx(2.9)


def test_a_run_from_another_source_is_measured_from_that_one(root, tmp_path):
    items = [
        compared_continual(root / "a", 0.1, 0.3),
        compared_continual(root / "b", 0.2, 0.5, recipe={"optimizer": {"lr": 1e-4}}),
        compared_continual(root / "c", 0.1, 0.3, source="/x/runs/early/model", key="other", raised=0.5),
        compared_continual(root / "scratch", 2.0, -0.5, kind="scratch"),
    ]
    record = write_comparison(items, tmp_path / "out")
    assert [start["name"] for start in record["frontier"]["starts"]] == ["org/base-30m", "early"]
    assert numbers(point_of(record, "c")) == pytest.approx([0.1, 0.3, 0.2])
    assert point_of(record, "c")["start"] == "early"
    assert numbers(point_of(record, "scratch")) == pytest.approx([2.0, -0.5, -2.5])  # from the most common one
    text = words_of(check_page((tmp_path / "out" / "compare.html").read_text()))
    assert "early began at 3.400 nats upstream and 3.700 downstream" in text
    assert "Each is measured from its own source, a baseline without one from the first." in text


def test_sources_that_differ_by_their_seed_are_one_start_and_each_seed_counts_from_its_own(root, tmp_path):
    items = [
        compared_continual(root / f"a-seed{s}", 0.1 + s / 100, 0.5, seed=s, source=f"/x/runs/base-seed{s}/model",
                           key=f"k{s}", raised=s / 10)
        for s in (0, 1)
    ]  # fmt: skip
    items += [compared_continual(root / "scratch", 2.0, 0.0, kind="scratch")]
    record = write_comparison(items, tmp_path / "out")
    assert record["frontier"]["starts"] == [
        {"name": "base", "upstream": pytest.approx(2.95), "downstream": pytest.approx(3.25)}
    ]
    point = point_of(record, "a")
    assert (point["n"], point["start"], point["settings"]["source"]) == (2, "base", "base")
    assert numbers(point) == pytest.approx([0.105, 0.5, 0.395])
    assert point["forgetting_std"] == pytest.approx(statistics.stdev([0.1, 0.11]))
    assert point["adaptation_std"] == pytest.approx(0.0, abs=1e-9)
    assert numbers(point_of(record, "scratch"))[:2] == pytest.approx([1.95, 0.05])


def test_sources_of_one_name_in_other_folders_are_two_starts(root, tmp_path):
    items = [
        compared_continual(root / name, 0.1, 0.5, source=f"/{name}/runs/base/model", key=name) for name in ("a", "b")
    ]
    starts = write_comparison(items, tmp_path / "out")["frontier"]["starts"]
    assert sorted(start["name"] for start in starts) == ["/a/runs/base/model", "/b/runs/base/model"]


def seeds(root, name, values, **options):
    """Write a run a seed; each value is what it forgets and gains."""
    return [
        compared_continual(
            root / f"{name}-seed{s}", kept, gain, seed=s, recipe={"optimizer": {"lr": rate(name)}}, **options
        )
        for s, (kept, gain) in enumerate(values)
    ]


def rate(name):
    return (1 + sum(map(ord, name))) * 1e-6


def test_the_frontier_is_what_none_beats_the_start_among_them(root, tmp_path):
    places = {
        "best": (0.1, 0.4), "more": (0.3, 0.5), "beaten": (0.2, 0.35), "equal": (0.1, 0.4), "level": (0.1, 0.3),
        "less": (-0.05, -0.05), "useless": (0.05, -0.02), "least": (-0.2, -0.3),
    }  # fmt: skip
    items = [compared_continual(root / n, *place, recipe={"optimizer": {"lr": rate(n)}}) for n, place in places.items()]
    items.append(compared_continual(root / "all-text", -0.5, 0.9, kind="scratch"))
    record = write_comparison(items, tmp_path / "out")
    found = record["frontier"]["non_dominated"]
    # What a baseline beats stays: that is another kind of training. What the start beats does not.
    assert set(found) <= set(places)
    assert [name for name in found if name not in ("best", "equal")] == ["least", "less", "more"]
    assert {"best", "equal"} <= set(found)
    assert record["frontier"]["recommended"] in ("best", "equal")
    assert any("A baseline is worth more: all-text" in sentence for sentence in record["summary"])


def test_a_tie_within_the_spread_goes_to_the_one_that_forgets_least(root, tmp_path):
    items = seeds(root, "bold", [(0.30, 0.70), (0.31, 0.73), (0.29, 0.67)])
    items += seeds(root, "careful", [(0.10, 0.47), (0.09, 0.49), (0.11, 0.50)])
    record = write_comparison(items, tmp_path / "out")
    frontier = record["frontier"]
    assert point_of(record, "bold")["net"] > point_of(record, "careful")["net"]
    assert (frontier["recommended"], frontier["not_told_apart"]) == ("careful", ["bold"])
    assert "The spread of the seeds does not tell its net from that of bold, which forgets more." in record["summary"]
    alone = write_comparison([items[0], items[3]], tmp_path / "alone")  # one seed each: no spread, no tie
    assert alone["frontier"]["recommended"] == "bold-seed0"
    assert alone["frontier"]["not_told_apart"] == []


def test_a_clear_lead_is_no_tie(root, tmp_path):
    items = seeds(root, "bold", [(0.30, 0.80), (0.31, 0.81), (0.29, 0.79)])
    items += seeds(root, "careful", [(0.10, 0.47), (0.09, 0.46), (0.11, 0.48)])
    frontier = write_comparison(items, tmp_path / "out")["frontier"]
    assert (frontier["recommended"], frontier["not_told_apart"]) == ("bold", [])


def test_the_sentence_names_the_settings_that_differ_and_only_those(root, tmp_path):
    def recipe(lr, fraction, warmup):
        replay = {"fraction": fraction, "data": "data/old"} if fraction else None
        return {"optimizer": {"lr": lr}, "replay": replay, "schedule": {"name": "cosine", "warmup": warmup}}

    items = [
        compared_continual(root / "good", 0.1, 0.5, recipe=recipe(3e-4, 0.05, 0.01)),
        compared_continual(root / "bad", 0.4, 0.5, recipe=recipe(3e-4, None, 0)),
    ]
    summary = write_comparison(items, tmp_path / "out")["summary"]
    assert summary[1] == (
        "Frontier: good forgets 0.100 and gains 0.500 nats, net 0.400; recommended (replay 5%, warm-up 1%)."
    )
    assert point_of(write_comparison(items, tmp_path / "out"), "bad")["settings"] == {
        "peak learning rate": "3e-4", "replay": "none", "warm-up": "none", "schedule": "cosine",
        "source": "org/base-30m",
    }  # fmt: skip


def test_one_run_alone_is_a_point_and_no_recommendation(root, tmp_path):
    record = write_comparison([compared_continual(root / "only", 0.1, 0.5)], tmp_path / "out")
    assert record["summary"][1] == "Frontier: only forgets 0.100 and gains 0.500 nats, net 0.400."
    assert record["frontier"]["recommended"] == "only"


@pytest.mark.parametrize("number_of", [1, 2])
def test_nothing_is_recommended_where_the_source_is_worth_more(root, tmp_path, number_of):
    items = [
        compared_continual(root / f"r{k}", 0.4 + k, 0.1, recipe={"optimizer": {"lr": (1 + k) * 1e-4}})
        for k in range(number_of)
    ]
    record = write_comparison(items, tmp_path / "out")
    assert record["frontier"]["recommended"] is None
    assert record["summary"][1].startswith("Frontier: r0 forgets 0.400 and gains 0.100 nats, net -0.300, ")
    assert "recommended" not in record["summary"][1]
    picture, _ = frontier_chart(compared(items).frontier)
    assert "ring" not in picture


@pytest.mark.parametrize(
    ("kept", "gain", "said"),
    [
        (-0.02, 0.3, "forgets nothing (0.020 better) and gains 0.300 nats, net 0.320"),
        (-0.5, -0.1, "forgets nothing (0.500 better) and loses 0.100 nats on the new text too, net 0.400"),
    ],
)
def test_the_sentence_follows_the_sign(root, tmp_path, kept, gain, said):
    record = write_comparison([compared_continual(root / "run", kept, gain)], tmp_path / "out")
    assert said in record["summary"][1]


def test_what_knows_other_text_is_left_out_and_named(root, tmp_path):
    items = [
        compared_continual(root / "a", 0.1, 0.5),
        compared_continual(root / "b", 0.2, 0.6, recipe={"optimizer": {"lr": 1e-4}}),
        compared_continual(root / "odd", 0.1, 0.4, upstream=["law"], recipe={"optimizer": {"lr": 2e-4}}),
    ]
    record = write_comparison(items, tmp_path / "out")
    assert record["frontier"]["left_out"] == ["odd"]
    assert row_of(record, "odd")["upstream"] is None
    assert row_of(record, "odd")["net"] is None
    assert "Not on the frontier, as they name other domains as upstream: odd." in record["summary"]
    assert [point["name"] for point in record["frontier"]["points"]] == ["a", "b"]


@pytest.mark.parametrize("upstream", [None, []])
def test_a_baseline_that_names_nothing_is_measured_on_what_the_others_name(root, tmp_path, upstream):
    items = [
        compared_continual(root / "a", 0.1, 0.5),
        compared_continual(root / "scratch", 2.0, 0.0, kind="scratch", upstream=upstream),
    ]
    if upstream is None:
        result = json.loads((items[1] / "result.json").read_text())
        del result["upstream"]
        write_json(items[1] / "result.json", result)
        (items[1] / "config.yaml").write_text(json.dumps(config(recipe="scratch", upstream=None, source=None)))
    record = write_comparison(items, tmp_path / "out")
    assert numbers(point_of(record, "scratch")) == pytest.approx([2.0, 0.0, -2.0])


def test_models_stand_beside_and_the_source_itself_is_the_start(root, tmp_path):
    items = [compared_continual(root / "a", 0.1, 0.5)]

    def model(name, higher):
        losses = records({n: nll + higher for n, nll in {**OLD, **NEW}.items()})
        return {"name": name, "model": {}, "domains": losses, "data": "d", "seq_len": 256}

    record = write_comparison(items, tmp_path / "out", [model("itself", 0.0), model("other", 0.3)])
    assert [point["name"] for point in record["frontier"]["points"]] == ["a", "other"]
    assert point_of(record, "other")["baseline"]
    assert numbers(row_of(record, "itself")) == pytest.approx([0.0, 0.0, 0.0])


def test_the_run_that_others_continue_is_the_start_and_one_that_branches_off_it_counts_from_there(root, tmp_path):
    branch = {"branch": {"run": "/x/runs/base", "step": 500}, "source": None}
    items = [
        compared_continual(root / "a", 0.1, 0.5),
        compared_continual(root / "early", 0.3, 0.4, recipe=branch),
        compared_continual(root / "base", 0.0, 0.0, kind="scratch"),
    ]
    record = write_comparison(items, tmp_path / "out")
    assert [point["name"] for point in record["frontier"]["points"]] == ["a", "early"]
    assert numbers(point_of(record, "early")) == pytest.approx([0.3, 0.4, 0.1])
    text = words_of(check_page((tmp_path / "out" / "compare.html").read_text()))
    assert "One that branches off a checkpoint counts from the finished source too" in text


def test_unfinished_runs_have_means_and_are_no_points(root, tmp_path):
    items = [
        compared_continual(root / "a", 0.1, 0.5),
        compared_continual(root / "half", 0.3, 0.9, state="running", recipe={"optimizer": {"lr": 1e-4}}),
    ]
    record = write_comparison(items, tmp_path / "out")
    row = row_of(record, "half")
    assert row["upstream"] == pytest.approx(3.2)
    assert row["downstream"] == pytest.approx(2.3)
    assert numbers(row) == [None, None, None]
    assert [point["name"] for point in record["frontier"]["points"]] == ["a"]
    only = write_comparison(items[1:], tmp_path / "only")
    assert only["frontier"] is None
    check_page((tmp_path / "only" / "compare.html").read_text())


def test_losses_that_are_missing_or_not_finite_make_no_point(root, tmp_path):
    items = [compared_continual(root / name, 0.1, 0.5, recipe={"optimizer": {"lr": rate(name)}}) for name in "abc"]
    for item, change in zip(items, ({"nll": None}, {"nll": 1e999}, {}), strict=True):
        result = json.loads((item / "result.json").read_text())
        result["domains"]["law"] |= change
        (item / "result.json").write_text(json.dumps(result).replace("Infinity", "1e999"))
    record = write_comparison(items, tmp_path / "out")
    assert [point["name"] for point in record["frontier"]["points"]] == ["c"]
    assert row_of(record, "a")["downstream"] is None
    assert row_of(record, "a")["upstream"] == pytest.approx(3.0)
    check_page((tmp_path / "out" / "compare.html").read_text())


@pytest.mark.parametrize("gone", ["source", "domains of the source"])
def test_without_losses_of_a_source_there_is_no_frontier(root, tmp_path, gone):
    item = compared_continual(root / "a", 0.1, 0.5)
    result = json.loads((item / "result.json").read_text())
    result["source"] = None if gone == "source" else result["source"] | {"domains": {"law": {"nll": 3.0}}}
    write_json(item / "result.json", result)
    (item / "source.json").unlink()
    record = write_comparison([item], tmp_path / "out")
    assert record["frontier"] is None
    assert row_of(record, "a")["upstream"] == pytest.approx(3.0)
    assert row_of(record, "a")["net"] is None


@pytest.mark.parametrize("upstream", [[], [*OLD, *NEW], ["nobody"]])
def test_where_nothing_is_old_or_nothing_new_there_is_no_frontier(root, tmp_path, upstream):
    record = write_comparison([compared_continual(root / "a", 0.1, 0.5, upstream=upstream)], tmp_path / "out")
    assert record["frontier"] is None
    assert row_of(record, "a")["upstream"] is None
    text = (tmp_path / "out" / "compare.html").read_text() + (tmp_path / "out" / "compare.md").read_text()
    assert "forgets" not in text


def test_other_comparisons_are_as_they_were(root, tmp_path, capsys):
    record = write_comparison([compared_run(root / "a", pair(4.0, 3.0))], tmp_path / "out")
    assert record["frontier"] is None
    assert [record["rows"][0][key] for key in ("upstream", "downstream", "forgetting", "adaptation", "net")] == [
        None
    ] * 5
    for name in ("compare.md", "compare.html"):
        assert "stream" not in (tmp_path / "out" / name).read_text().partition("</style>")[2]
    print_comparison(record, tmp_path / "out")
    title = capsys.readouterr().out.splitlines()[1].split()
    assert title[2:] == [
        "(nats)",
        "layers",
        "params",
        "seed",
        "tokens",
        "time",
        "prose",
        "code",
        "mean",
    ]


def sample(root):
    items = seeds(root, "mild", [(0.05, 0.30), (0.06, 0.31), (0.04, 0.32)])
    items += seeds(root, "strong", [(0.30, 0.60), (0.28, 0.62), (0.32, 0.61)])
    items += seeds(root, "poor", [(0.35, 0.40), (0.36, 0.41), (0.34, 0.42)])
    items.append(compared_continual(root / "union", 0.02, 0.45, kind="scratch"))
    items.append(compared_continual(root / "scratch", 4.0, -1.0, kind="scratch", recipe={"train": {"steps": 800}}))
    return items


def drawing_of(picture, name="wide"):
    return str(picture)[str(picture).index(f'id="frontier-plot-{name}-title"') :].partition("</svg>")[0]


def test_the_drawing_has_points_whiskers_steps_and_what_is_outside(root):
    frontier = compared(sample(root)).frontier
    assert frontier is not None
    picture, away = frontier_chart(frontier)
    assert away == " Outside of the frame: scratch (forgets 4.00, gains \u22121.00)."
    for name in ("wide", "narrow"):
        drawing = drawing_of(picture, name)
        plot = drawing[drawing.rindex('class="small">learned of the new text') :]
        # Three runs, two on the frontier, one of them recommended; the start and one baseline.
        assert len(re.findall(r'class="marker child"', plot)) == 2
        assert len(re.findall(r'class="marker child hollow"', plot)) == 1
        assert len(re.findall(r'<rect [^>]*class="marker control"', plot)) == 1
        assert plot.count('class="marker source"') == 1
        assert plot.count('class="ring child"') == 1
        assert plot.count('class="whisker"') == 3 * 2 * 2 * 2  # runs, both ways, both ends, and their caps
        steps = re.search(
            r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)" class="line child slim"', plot
        )
        assert steps is not None
        x1, y1, x2, y2, x3, y3 = map(float, steps.groups())
        assert (y1, x2) == (y2, x3)  # first to the right, then up
        assert x2 > x1
        assert y3 < y2
        assert plot.count('class="net"') >= 3


def test_what_is_recommended_has_the_ring_and_the_bold_name(root):
    frontier = compared(sample(root)).frontier
    assert frontier is not None
    assert frontier.recommended is not None
    drawing = drawing_of(frontier_chart(frontier)[0])
    ring = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="9" class="ring child"', drawing)
    assert ring is not None
    bold = re.findall(r'class="label value halo">([^<]*)<', drawing)
    assert bold == [frontier.recommended.name] == ["strong"]


def test_where_points_lie_on_each_other_the_recommended_one_keeps_its_name(root):
    wide = [(0.1, 0.55), (0.2, 0.62), (0.0, 0.7)]
    items = [item for name in ("one", "two", "three", "four") for item in seeds(root, name, wide)]
    frontier = compared(items).frontier
    assert frontier is not None
    assert frontier.recommended is not None
    k = frontier.points.index(frontier.recommended) + 1
    for name in ("wide", "narrow"):
        bold = re.findall(
            r'class="(?:label|small ink) value halo">([^<]*)<', drawing_of(frontier_chart(frontier)[0], name)
        )
        assert bold in ([frontier.recommended.name], [str(k)])


def test_a_run_that_blew_up_and_an_end_for_a_trifle_do_not_press_the_others_together(root):
    items = sample(root)
    items.append(compared_continual(root / "blown", 9.0, -3.0, recipe={"optimizer": {"lr": 1.0}}))
    items.append(compared_continual(root / "greedy", 5.0, 0.63, recipe={"optimizer": {"lr": 0.5}}))
    frontier = compared(items).frontier
    assert frontier is not None
    assert "greedy" in [point.name for point in frontier.non_dominated]
    picture, away = frontier_chart(frontier)
    assert "blown (forgets 9.00, gains \u22123.00)" in away
    assert "greedy (forgets 5.00, gains 0.63)" in away
    assert ">5.0<" not in drawing_of(picture)
    assert len(re.findall(r'class="line child slim"', drawing_of(picture))) == 1


def label_boxes(drawing):
    """Return the boxes of the labels of points, as text is measured when it is drawn."""
    found = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" class="(label|small ink)[a-z ]*halo">([^<]*)<', drawing)
    sizes = {"label": 14.0, "small ink": 12.0}
    boxes = []
    for x, y, kind, text in found:
        left, base, size = float(x), float(y), sizes[kind]
        boxes.append((text, Box(left, base - 0.85 * size, left + text_width(text, size), base + 0.15 * size)))
    return boxes


@pytest.mark.parametrize("number_of", [4, 24])
def test_labels_overlap_nowhere_and_where_it_is_crowded_they_are_numbers(root, number_of):
    far = 6 if number_of == 4 else 1
    places = [(0.2 + far * 0.01 * (k % 5), 0.3 + far * 0.01 * (k // 5 + k % 5)) for k in range(number_of)]
    items = [
        compared_continual(root / f"a-long-name-of-run-{k:02}", *place, recipe={"optimizer": {"lr": (1 + k) * 1e-5}})
        for k, place in enumerate(places)
    ]
    frontier = compared(items).frontier
    assert frontier is not None
    picture, _ = frontier_chart(frontier)
    for name in ("wide", "narrow"):
        boxes = label_boxes(drawing_of(picture, name))
        texts = [text for text, _ in boxes if text != "start"]
        for (_, one), (_, other) in itertools.combinations(boxes, 2):
            shrunk = Box(one.left + 0.2, one.top + 0.2, one.right - 0.2, one.bottom - 0.2)
            assert not shrunk.touches(other)
        if number_of == 24:
            assert texts
            assert all(text.isdigit() for text in texts)
        elif name == "wide":
            assert sorted(texts) == sorted(point.name for point in frontier.points)


def test_the_page_has_the_numbers_of_every_point_in_the_order_of_their_net(root, tmp_path):
    record = write_comparison(sample(root), tmp_path / "out")
    page = check_page((tmp_path / "out" / "compare.html").read_text())
    document = (tmp_path / "out" / "compare.html").read_text()
    table = document[document.index('id="frontier-table"') :].partition("</table>")[0]
    rows = [re.sub(r"<[^>]*>", "|", row) for row in table.split("<tr>")[2:]]
    order = ["union", "strong", "mild", "poor", "scratch"]
    assert [point["name"] for point in record["frontier"]["points"]] == order
    for k, (name, row) in enumerate(zip(order, rows, strict=True), 1):
        point = point_of(record, name)
        assert f"|{k}\u2002|" in row
        assert f"|{name}|" in row
        for key in ("forgetting", "adaptation", "net"):
            shown = f"{point[key]:+.3f}".replace("-", "\u2212")
            spread = point[f"{key}_std"]
            assert shown + (f" \u00b1 {spread:.3f}" if spread is not None else "") in row
    text = words_of(page)
    assert "recommended" in rows[1]
    assert "baseline" in rows[0]
    assert "literature, reference; downstream, the new text, that over law, medicine" in text
    assert "Outside of the frame: scratch" in text


def test_markdown_and_terminal_have_the_columns(root, tmp_path, capsys):
    record = write_comparison(sample(root), tmp_path / "out")
    table = (tmp_path / "out" / "compare.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")
    ]
    at = [lines[0].index(name) for name in ("upstream", "downstream", "forgets", "gains")]
    strong = next(line for line in lines if line[0].lstrip("| ").strip() == "strong")
    point = point_of(record, "strong")
    assert [strong[k] for k in at[:2]] == [f"{point['upstream']:.3f}", f"{point['downstream']:.3f}"]
    assert [strong[k] for k in at[2:]] == [
        f"{point[key]:+.3f} \u00b1 {point[key + '_std']:.3f}" for key in ("forgetting", "adaptation")
    ]
    source = next(line for line in lines if "(source)" in line[0])
    assert [source[k] for k in at] == ["2.900", "3.200", "\u2013", "\u2013"]
    assert "Frontier: strong forgets 0.300 and gains 0.610 nats" in table
    assert "by how much upstream is higher, and downstream lower." in table
    print_comparison(record, tmp_path / "out")
    out = capsys.readouterr().out
    assert re.search(r"params +seed +tokens +upstream +downstream +mean +forgets +gains", out)
    assert re.search(
        r"strong +29.4M +3 seeds +409.6k +3\.200 +2\.590 +2\.895 +\+0\.300 ± 0\.020 +\+0\.610 ± 0\.010", out
    )
    assert re.search(r"union +29.4M +0 +409.6k +2\.920 +2\.750 +2\.835 +\+0\.020 +\+0\.450", out)
    assert re.search(r"\(source\) +2\.900 +3\.200 +3\.050", out)
    assert "Frontier: strong" in out


def hostile_items(root):
    attack = " ".join(HOSTILE)
    recipe = {"schedule": {"name": attack, "warmup": attack}, "upstream": {"dir": attack, "domains": list(OLD)}}
    items = []
    for k in range(3):
        name, own = f"<img src=x onerror=alert({k})>\u202e|*_`[x](y)", {"optimizer": {"lr": (1 + k) * 1e-4}}
        changes = {"source": f"{attack}{k % 2}", "key": str(k % 2), "recipe": recipe | own}
        items.append(compared_continual(root / name, 0.1 + k / 10, 0.5 + k / 10, **changes))
    items.append(compared_continual(root / "<script>far", 9.0, -5.0, kind="scratch"))
    items.append(compared_continual(root / "'onload='", 0.1, 0.5, upstream=["law"], recipe=recipe))
    names = {f"{k} {bad}": 3.0 for k, bad in enumerate(HOSTILE)}
    for item in items:
        result = json.loads((item / "result.json").read_text())
        result["domains"] |= records(names)
        result["upstream"] = [*result["upstream"], *list(names)[:4]]
        if result["source"]:
            result["source"]["domains"] |= records(names)
        write_json(item / "result.json", result)
    return items


def test_hostile_names_are_shown_and_cannot_act(root, tmp_path, monkeypatch):
    items = hostile_items(root)
    record = write_comparison(items, tmp_path / "out")
    assert len(record["frontier"]["points"]) == 4
    assert len(record["frontier"]["starts"]) == 2
    document = (tmp_path / "out" / "compare.html").read_text()
    check_inert(document)
    assert "Outside of the frame: <script>far" in Page(document).text
    table = (tmp_path / "out" / "compare.md").read_text()
    assert not re.search("<img|<script|\u202e", table)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    monkeypatch.setattr(report_html, "escape", str)
    with pytest.raises(AssertionError):
        check_inert(write_and_read(items, tmp_path / "raw"))


def write_and_read(items, out):
    write_comparison(items, out)
    return (out / "compare.html").read_text()


@pytest.mark.parametrize(
    "recipe",
    [
        {"optimizer": 3, "schedule": "x", "replay": [], "stages": "two", "source": 7},
        {"optimizer": {"lr": float("inf")}, "schedule": {"warmup": float("nan")}, "replay": {"fraction": "much"}},
        {"stages": [None, 3, {}], "optimizer": {"lr": True}},
    ],
)
def test_odd_recipes_break_no_comparison(root, tmp_path, recipe):
    record = write_comparison([compared_continual(root / "a", 0.1, 0.5, recipe=recipe)], tmp_path / "out")
    assert numbers(point_of(record, "a")) == pytest.approx([0.1, 0.5, 0.4])
    check_page((tmp_path / "out" / "compare.html").read_text())


class WithConfig:
    def __init__(self, config):
        self.config = config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": {"warmup": 20}}, {"warm-up": "20 steps"}),
        ({"schedule": {"warmup": "50M tokens"}}, {"warm-up": "50M tokens"}),
        ({"replay": {"fraction": 0.005}}, {"replay": "0.5%"}),
        ({"replay": None}, {"replay": "none"}),
        ({"stages": [{"optimizer": {"lr": 1e-4}}, {}]}, {"peak learning rate": "1e-4, 3e-4", "replay": "5%"}),
        ({"stages": [{}, {"replay": None}]}, {"peak learning rate": "3e-4", "replay": "5%, none"}),
        ({"stages": [{"name": "a"}, {"name": "b"}]}, {"peak learning rate": "3e-4", "replay": "5%"}),
        ({"source": "/a/runs/up-seed3/model"}, {"source": "up"}),
        ({"source": None, "branch": {"run": "/a/runs/up-seed3"}}, {"source": "up", "branch": "newest checkpoint"}),
        ({"branch": {"run": "/a/runs/up", "step": 1500}}, {"source": "org/base-30m", "branch": "step 1,500"}),
    ],
)  # fmt: skip
def test_settings_are_in_words(changes, expected):
    found = settings_of(WithConfig(config(**changes)))
    assert {key: found[key] for key in expected} == expected


def test_words_of_rates_shares_and_sources():
    assert [rate_words(value) for value in (3e-4, 1.65e-4, 0.01, 1.0)] == ["3e-4", "1.65e-4", "1e-2", "1e0"]
    assert [share_words(value) for value in (0.25, 0.001, 0.333)] == ["25%", "0.1%", "33.3%"]
    names = ("smollm2-135m", "a/b", "../there/model", "model", "/x/y")
    assert [source_label(name) for name in names] == ["smollm2-135m", "a/b", "there", "model", "y"]


@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 200), st.floats(2, 9), st.text("ab", min_size=1, max_size=9)),
        max_size=12,
    ),
    st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), max_size=4),
)
def test_no_label_touches_another_a_point_or_a_wall_and_all_stay_inside(given_spots, given_walls):
    bounds = Box(0, 0, 300, 200)
    spots = [Spot(*one) for one in given_spots]
    walls = [Box(x, y, x + 20, y + 5) for x, y in given_walls]
    placed = [one.box for one in place_labels(spots, 12, bounds, walls) if one is not None]
    points = [Box(s.x - s.radius, s.y - s.radius, s.x + s.radius, s.y + s.radius) for s in spots]
    for k, box in enumerate(placed):
        assert box.is_inside(bounds)
        assert not any(box.touches(other) for other in (*placed[:k], *points, *walls))


def test_a_label_avoids_a_line_if_it_can_and_takes_it_if_it_must():
    spot = Spot(100, 100, 4, "name")
    (free,) = place_labels([spot], 12, Box(0, 0, 300, 200))
    assert free is not None
    line = Box(104, 98, 300, 102)
    (beside,) = place_labels([spot], 12, Box(0, 0, 300, 200), lines=[line])
    assert beside is not None
    assert free.box.touches(line)
    assert not beside.box.touches(line)
    narrow = Box(95, 90, 300, 110)  # only to the right is there room
    (forced,) = place_labels([spot], 12, narrow, lines=[line])
    assert forced is not None
    assert forced.box == free.box
    assert place_labels([spot], 12, narrow, walls=[line]) == [None]


def test_a_net_that_is_a_loss_is_never_recommended_however_wide_the_spread(root, tmp_path):
    values = {
        "bold": [(0.3, 0.30), (0.3, 0.42)],  # net 0.06 on average, and its spread as large
        "mid": [(0.2, 0.25), (0.2, 0.25)],
        "meek": [(0.1, 0.06), (0.1, 0.10)],  # net -0.02
    }
    items = [run for name, found in values.items() for run in seeds(root, name, found)]
    record = write_comparison(items, tmp_path / "out")["frontier"]
    assert record["recommended"] == "mid"
    assert record["not_told_apart"] == ["bold"]


def test_runs_with_other_upstream_text_do_not_compare(root, tmp_path):
    items = [compared_continual(root / name, 0.1, 0.3) for name in ("a", "b", "c")]
    for folder, upstream in zip(items, ("u1", "u1", "u2"), strict=True):
        manifest = json.loads((folder / "manifest.json").read_text())
        write_json(folder / "manifest.json", manifest | {"upstream": {"dir": "x", "fingerprint": upstream}})
    record = write_comparison(items, tmp_path / "out")
    assert [row_of(record, name)["not_comparable"] for name in ("a", "b", "c")] == [None, None, "other data"]


def test_replay_that_names_no_share_is_the_usual_one(root):
    stages = [{"name": "x", "replay": None}, {"name": "y", "replay": {"stage": "x"}}]
    folder = compared_continual(root / "a", 0.1, 0.3, recipe={"replay": None, "stages": stages})
    assert settings_of(read_run(folder))["replay"] == "none, 5%"
