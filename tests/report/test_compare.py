"""Comparisons: the numbers are those of the folders, what does not compare is said, and nothing in it can act."""

import json
import statistics

import pytest
from compared_folders import SOURCE, TOKENS, compared_run, pair
from test_report import HOSTILE, Page, check_inert, check_page, words

from scionlm import api
from scionlm.core.config import dump_yaml
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json
from scionlm.report import comparable_setup, is_run, render_report, write_comparison, write_report
from scionlm.report import html as report_html
from scionlm.report.compare import compared
from scionlm.report.compare_charts import dot_chart, loss_chart, tracks


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def row_of(record, name):
    return next(row for row in record["rows"] if row["name"] == name)


def named(group_or_row):
    return [one["name"] for one in group_or_row]


def test_the_share_of_the_gap_is_that_of_the_control_with_the_same_shape_and_tokens(root, tmp_path):
    items = [
        compared_run(root / "good", pair(4.0, 3.0), strategy="a"),
        compared_run(root / "poor", pair(5.0, 4.0), strategy="b"),
        compared_run(root / "deep", pair(3.5, 2.5), strategy="c", layers=12),
        compared_run(root / "long", pair(3.4, 2.4), strategy="d", tokens=2 * TOKENS),
        compared_run(root / "random", pair(6.0, 5.0), init="random"),
    ]
    record = write_comparison(items, tmp_path / "out")
    # Source 2.5, control 5.5: good (5.5 - 3.5) / 3, poor (5.5 - 4.5) / 3.
    assert record["source"]["mean"] == 2.5
    assert row_of(record, "good")["gap_closed"] == pytest.approx(2 / 3)
    assert row_of(record, "poor")["gap_closed"] == pytest.approx(1 / 3)
    for other in ("deep", "long", "random"):  # another shape, other tokens, the control itself
        assert row_of(record, other)["gap_closed"] is None
    assert named(record["rows"]) == ["long", "deep", "good", "poor", "random"]
    assert [group["name"] for group in record["groups"] if group["best"]] == ["long"]
    assert record["summary"][0] == (
        "long has the lowest held-out loss: 2.900 nats (mean over 2 domains), 0.100 below deep, the next best."
    )
    assert "With one seed each no spread is known." in record["summary"]


def test_a_runs_own_control_comes_first_and_equal_ones_stand_once(root, tmp_path):
    items = [
        compared_run(root / "own", pair(4.0, 3.0), control=pair(7.0, 6.0), strategy="a"),
        compared_run(root / "same", pair(4.5, 3.5), control=pair(7.0, 6.0), strategy="b"),
        compared_run(root / "bare", pair(4.0, 3.0), strategy="c"),
        compared_run(root / "random", pair(6.0, 5.0), init="random"),
    ]
    record = write_comparison(items, tmp_path / "out")
    assert row_of(record, "own")["gap_closed"] == pytest.approx((6.5 - 3.5) / (6.5 - 2.5))
    assert sorted(named(record["rows"])) == ["bare", "own", "own/control", "random", "same"]
    # Without one of its own, the mean of those there are: of its seed the first.
    assert row_of(record, "bare")["gap_closed"] in (pytest.approx(2 / 3), pytest.approx(3 / 4))


def test_the_control_of_the_same_seed_counts_else_the_mean_of_the_others(root, tmp_path):
    items = [compared_run(root / f"a{s}", pair(4.0, 3.0), seed=s, strategy="a") for s in (0, 1, 2)]
    items += [
        compared_run(root / f"r{s}", pair(level, level - 1), seed=s, init="random") for s, level in ((0, 6.0), (1, 8.0))
    ]
    record = write_comparison(items, tmp_path / "out")
    shares = [row_of(record, f"a{s}")["gap_closed"] for s in (0, 1, 2)]
    assert shares == pytest.approx([2 / 3, 4 / 5, 3 / 4])


def test_the_gap_is_that_of_the_domains_that_all_three_share(root, tmp_path):
    run = compared_run(root / "run", pair(4.0, 3.0), control={"prose": 6.0}, source_nll={"prose": 3.0, "code": 2.0})
    record = write_comparison([run], tmp_path / "out")
    assert row_of(record, "run")["gap_closed"] == pytest.approx((6.0 - 4.0) / (6.0 - 3.0))


def test_runs_that_differ_by_their_seed_are_one(root, tmp_path):
    levels = {"a": (4.0, 4.2, 4.1), "b": (4.15, 4.35, 4.25), "c": (6.0, 6.1, 6.2)}
    items = [
        compared_run(root / f"{name}-seed{seed}", pair(level, level - 1), seed=seed, strategy=name)
        for name, means in levels.items()
        for seed, level in enumerate(means)
    ]
    record = write_comparison(items, tmp_path / "out")
    assert named(record["groups"]) == ["a", "b", "c"]
    first = record["groups"][0]
    means = [level - 0.5 for level in levels["a"]]
    assert (first["n"], first["seeds"], first["best"]) == (3, [0, 1, 2], True)
    assert first["mean"] == pytest.approx(statistics.fmean(means))
    assert first["std"] == pytest.approx(statistics.stdev(means)) == pytest.approx(0.1)
    assert first["domains"] == pytest.approx({"prose": 4.1, "code": 3.1})
    assert row_of(record, "b-seed1")["group"] == "b"
    # Within the spread of either, and yet lower in every seed: beside each other they have seen the same text.
    assert "seed by seed the best is 0.150 \u00b1 0.000 lower, in all 3 of them." in record["summary"][1]
    assert first["behind_best"] is None
    behind = record["groups"][1]["behind_best"]
    assert behind == {"mean": pytest.approx(0.15), "std": pytest.approx(0.0, abs=1e-9), "seeds": 3, "worse": 3}
    text = words(check_page((tmp_path / "out" / "compare.html").read_text()))
    assert "3.600 ± 0.100" in text
    assert "a-seed0" in text


def test_a_lead_that_turns_with_the_seed_is_none(root, tmp_path):
    levels = {"a": (4.0, 4.2, 4.1), "b": (4.3, 4.1, 4.2)}
    for name, means in levels.items():
        for seed, level in enumerate(means):
            compared_run(root / f"{name}-seed{seed}", pair(level, level), seed=seed, strategy=name)
    record = write_comparison(sorted(root.iterdir()), tmp_path / "out")
    assert "in 2 of 3 of them: no winner is known." in record["summary"][1]
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| 0.100 \u00b1 0.200 |" in table
    assert "Behind: " in table
    assert table.splitlines()[4].count("|") == table.splitlines()[6].count("|")


@pytest.mark.parametrize(
    ("level", "told"), [(4.0, "within that spread: no winner is known."), (6.0, "more than that.")]
)
def test_seeds_that_differ_are_told_apart_by_their_spread(root, tmp_path, level, told):
    for name, seeds, mean in (("a", (0, 1), 4.0), ("b", (1, 2), level)):
        for seed in seeds:
            compared_run(root / f"{name}-seed{seed}", pair(mean + seed / 10, mean), seed=seed, strategy=name)
    record = write_comparison(sorted(root.iterdir()), tmp_path / "out")
    assert f"their difference is {told}" in record["summary"][1]
    assert "| behind |" not in (tmp_path / "out" / "compare.md").read_text()


def test_sweeps_with_a_reference_each_are_one_too(root, tmp_path):
    for seed in (0, 1, 2):
        sweep = root / f"small-seed{seed}"
        source = {"source": str(sweep / "runs" / "reference" / "model"), "seed": seed}
        compared_run(sweep / "runs" / "first", pair(4.0 + seed / 10, 3.0), **source)
        compared_run(sweep / "runs" / "random", pair(6.0 + seed / 10, 5.0), init="random", **source)
        (sweep / "config.yaml").write_text("recipe: sweep\nruns: [{name: first}, {name: random}]\n")
    record = write_comparison([root / f"small-seed{seed}" for seed in (0, 1, 2)], tmp_path / "out")
    assert [(one["name"], one["seeds"]) for one in record["groups"]] == [
        ("small/first", [0, 1, 2]), ("small/random", [0, 1, 2])]  # fmt: skip
    closed = statistics.fmean(2 / (3 + seed / 20) for seed in (0, 1, 2))  # of the gap to its own control
    assert record["groups"][0]["gap_closed"] == pytest.approx(closed)


def test_what_a_run_costs_counts_its_devices(root, tmp_path):
    run = compared_run(root / "run", pair(4.0, 3.0))
    path = run / "result.json"
    result = json.loads(path.read_text())
    result["training"] |= {"devices": 8, "seconds": 900.0}
    path.write_text(json.dumps(result))
    record = write_comparison([run, compared_run(root / "other", pair(5.0, 4.0))], tmp_path / "out")
    assert row_of(record, "run")["device_hours"] == 2.0
    assert row_of(record, "other")["device_hours"] == row_of(record, "other")["seconds"] / 3600
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "15 min \u00d7 8" in table
    assert table.count("\u00d7 8") == 1


@pytest.mark.parametrize(
    ("prose", "said"),
    [(4.0, "it closes 67% of the gap between control and source."), (2.0, "it is better than the source.")],
)
def test_the_headline_says_what_the_winner_is_worth(root, tmp_path, prose, said):
    items = [compared_run(root / "a", pair(prose, prose - 1), control=pair(6.0, 5.0))]
    assert write_comparison(items, tmp_path / "out")["summary"][0].endswith(said)


def test_a_seed_twice_is_no_second_measurement_and_other_settings_are_another_group(root, tmp_path):
    items = [
        compared_run(root / "x", pair(4.0, 3.0), seed=0),
        compared_run(root / "again", pair(4.0, 3.0), seed=0),
        compared_run(root / "y", pair(4.2, 3.2), seed=1),
        compared_run(root / "z", pair(4.4, 3.4), seed=2, strategy="other"),
    ]
    record = write_comparison(items, tmp_path / "out")
    assert sorted((group["name"], group["n"]) for group in record["groups"]) == [("again", 1), ("x, y", 2), ("z", 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nll": {"prose": 3.0}}, "other domains"),
        ({"num_tokens": 100}, "losses of 100 tokens a domain, not of 4,096"),
        ({"data": "d2"}, "other data"),
        ({"seq_len": 32}, "windows of 32 tokens, not of 256"),
    ],
)
def test_what_does_not_compare_is_shown_and_named_and_gets_no_gap(root, tmp_path, change, reason):
    strange = {"nll": pair(3.0, 2.0), "strategy": "s"} | change
    items = [
        compared_run(root / "a", pair(4.0, 3.0), strategy="a"),
        compared_run(root / "random", pair(6.0, 5.0), init="random"),
        compared_run(root / "strange", strange.pop("nll"), **strange),
    ]
    record = write_comparison(items, tmp_path / "out")
    row = row_of(record, "strange")
    assert (row["not_comparable"], row["gap_closed"], row["group"]) == (reason, None, None)
    assert record["rows"][-1] == row
    assert f"Not comparable with the others: strange ({reason})." in record["summary"]
    assert record["summary"][0].startswith("a has the lowest")
    assert row_of(record, "a")["gap_closed"] == pytest.approx(2 / 3)
    assert "strange" not in [track.name for track in tracks(compared(items))]


@pytest.mark.parametrize(
    ("state", "code", "shown"), [("running", 0, 5.0), ("stopped", 75, 5.0), ("failed", 74, 5.0), ("failed", 3, None)]
)
def test_an_unfinished_run_has_its_last_loss_and_wins_nothing(root, tmp_path, state, code, shown):
    items = [
        compared_run(root / "a", pair(5.5, 5.5), control=pair(7.0, 7.0)),
        compared_run(root / "half", pair(5.0, 5.0), state=state, exit_code=code, tokens=TOKENS // 2, strategy="b"),
    ]
    record = write_comparison(items, tmp_path / "out")
    row = row_of(record, "half")
    assert row["state"] == ("diverged" if code == 3 else state)
    assert row["mean"] == shown
    assert (row["gap_closed"], row["not_comparable"], row["tokens"]) == (None, None, TOKENS // 2)
    assert record["summary"][0].startswith("a has the lowest")
    assert f"Without a final loss: half ({row['state']})." in record["summary"]
    assert [track.name for track in tracks(compared(items))] == ["a", "half", "a/control"]


def test_the_tokens_of_an_unfinished_run_are_those_that_its_loss_was_measured_after(root, tmp_path):
    run = compared_run(root / "half", pair(5.0, 5.0), state="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "tokens": 5 * TOKENS, "train/nll_nats": 1.0}) + "\n")
    assert row_of(write_comparison([run], tmp_path / "out"), "half")["tokens"] == TOKENS


def test_nothing_finished_claims_nothing(root, tmp_path):
    record = write_comparison([compared_run(root / "half", pair(5.0, 5.0), state="running")], tmp_path / "out")
    assert record["summary"][0] == "None of these has final losses that compare yet."
    assert record["source"]["mean"] == 2.5  # from source.json, which is there before a result is
    (root / "empty").mkdir()
    (root / "empty" / "status.json").write_text('{"format_version": 1, "state": "running"}')
    assert write_comparison([root / "empty"], tmp_path / "other")["domains"] == []
    check_page((tmp_path / "other" / "compare.html").read_text())


def test_a_run_that_begins_with_another_ones_result_is_measured_against_the_first_source(root, tmp_path):
    first = compared_run(root / "first", pair(4.0, 3.0), control=pair(6.0, 5.0), strategy="a")
    (first / "model").mkdir()
    second = compared_run(
        root / "second", pair(4.5, 3.5), source=str(first / "model"), source_nll=pair(4.0, 3.0), strategy="b"
    )
    record = write_comparison([second, first], tmp_path / "out")
    assert [source["name"] for source in record["sources"]] == ["big"]
    assert row_of(record, "second")["gap_closed"] == pytest.approx((5.5 - 4.0) / (5.5 - 2.5))
    alone = write_comparison([second], tmp_path / "alone")
    assert alone["source"]["mean"] == 3.5


def test_text_of_pruning_is_measured_and_tells_runs_apart(root, tmp_path):
    """Its domains are among those of the losses."""
    items = [compared_run(root / name, pair(4.0, 3.0)) for name in "ab"]
    for folder in items:
        path = folder / "manifest.json"
        stages = {"pruning": {"data": f"text of {folder.name}"}, "main": {"data": "d1"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"stages": stages}))
    record = write_comparison(items, tmp_path / "out")
    assert [row["not_comparable"] for row in record["rows"]].count("other data") == 1


def test_plain_models_stand_beside_runs_and_never_win(root, tmp_path):
    items = [compared_run(root / "a", pair(4.0, 3.0))]
    losses = {name: {"nll": nll, "num_tokens": 4096} for name, nll in SOURCE.items()}
    model = {
        "name": "a", "model": {"num_parameters": 9, "num_hidden_layers": 30}, "domains": losses, "data": "d1",
        "seq_len": 256,
    }  # fmt: skip
    record = write_comparison(items, tmp_path / "out", [model, model | {"name": "b", "data": "d2"}])
    assert record["summary"][0].startswith("Of the runs, a has the lowest held-out loss: 3.500")
    row = row_of(record, "a (model)")
    assert (row["kind"], row["mean"], row["gap_closed"], row["not_comparable"]) == ("model", 2.5, None, None)
    assert row_of(record, "b")["not_comparable"] == "other data"
    only = write_comparison([], tmp_path / "only", [model])
    assert only["summary"][0].startswith("a has the lowest")


def test_a_sweep_stands_for_its_runs_and_has_the_page_as_its_report(root, tmp_path):
    sweep = root / "sweep"
    for name in ("a", "b"):
        compared_run(sweep / "runs" / name, pair(4.0, 3.0), strategy=name)
    (sweep / "config.yaml").write_text("recipe: sweep\nruns: [{name: a}, {name: b}]\n")
    single = compared_run(root / "a", pair(5.0, 4.0), strategy="c")
    record = write_comparison([sweep, single, sweep / "runs" / "a"], tmp_path / "out")
    assert sorted(named(record["rows"])) == ["b", "sweep/a", f"{tmp_path.name}/a"]
    assert write_report(sweep) == sweep / "compare.html"
    assert "Scion comparison" in words(check_page(render_report(sweep)))
    assert is_run(sweep)
    assert is_run(single)
    assert not is_run(tmp_path)
    assert not is_run(tmp_path / "nowhere")
    empty = root / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("recipe: sweep\n")
    with pytest.raises(UsageError, match="is a sweep without runs yet"):
        write_comparison([empty], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_models_are_measured_as_most_runs_were(root):
    items = [compared_run(root / f"a{k}", pair(4.0, 3.0), strategy=str(k)) for k in range(2)]
    items.append(compared_run(root / "b", pair(4.0, 3.0), seq_len=32, num_tokens=50, strategy="b"))
    usual = comparable_setup(items)
    assert (usual.seq_len, usual.domains) == (256, {"prose", "code"})
    assert dict(usual.num_tokens or ()) == {"prose": 4096, "code": 4096}


def test_the_document_holds_what_others_rely_on_and_finite_numbers_only(root, tmp_path):
    run = compared_run(root / "a", pair(4.0, 3.0))
    result = json.loads((run / "result.json").read_text())
    result["training"]["flops"] = 1e999
    result["domains"]["code"]["nll"] = None
    (run / "result.json").write_text(json.dumps(result).replace("Infinity", "1e999"))
    record = write_comparison([run], tmp_path / "out")
    assert read_json(tmp_path / "out" / "compare.json") == record
    assert {"format_version", "domains", "source", "rows", "groups"} <= set(record)
    expected = {
        "name", "seed", "num_parameters", "num_hidden_layers", "tokens", "flops", "seconds", "domains", "mean",
        "gap_closed", "state",
    }  # fmt: skip
    assert expected <= set(record["rows"][0])
    assert record["rows"][0]["flops"] is None
    assert record["rows"][0]["domains"] == {"prose": 4.0}
    assert record["rows"][0]["mean"] is None  # not the mean of fewer domains
    assert not list((tmp_path / "out").glob(".*"))


def test_sixteen_lines_keep_a_legend_and_labels_apart_and_more_are_counted(root, tmp_path):
    items = [compared_run(root / f"run-{k:02}", pair(4 + k / 10, 3 + k / 10), strategy=f"{k}") for k in range(18)]
    comparison = compared(items)
    drawn = tracks(comparison)
    assert len(drawn) == 16
    assert len({track.tone for track in drawn}) == 16
    picture, _ = loss_chart(comparison)
    for track in drawn:
        assert picture.count(f">{track.name}<") >= 2  # in the legend of the wide and the narrow drawing
    record = write_comparison(items, tmp_path / "out")
    assert len(record["rows"]) == 18
    text = words(check_page((tmp_path / "out" / "compare.html").read_text()))
    assert "2 more lines would not be told apart" in text


def test_first_losses_that_would_flatten_the_rest_leave_the_frame_and_are_told(root, tmp_path):
    high = [compared_run(root / "high", pair(4.0, 3.0), start=90.0), compared_run(root / "b", pair(4.2, 3.2), seed=1)]
    assert "The first losses, up to 90.00, lie above the frame." in loss_chart(compared(high))[1]
    low = [compared_run(root / "low", pair(4.0, 3.0), start=3.9)]
    assert loss_chart(compared(low))[1] == ""


def test_a_source_far_away_is_told_and_not_drawn_among_dots(root):
    close = [compared_run(root / f"a{k}", pair(14 + k / 100, 13), strategy=str(k)) for k in range(3)]
    picture, note = dot_chart(compared(close))
    assert "source 2.50" in note
    assert "source" not in str(picture)
    wide = [compared_run(root / f"b{k}", pair(3 + k, 3), strategy=str(k)) for k in range(3)]
    picture, note = dot_chart(compared(wide))
    assert note == ""
    assert "source 2.50" in str(picture)


def hostile_items(root):
    """Return runs in which every text is an attack."""
    everything = " ".join(HOSTILE)
    domains = {f"{k} {bad}": 3.0 + k / 10 for k, bad in enumerate(HOSTILE)}
    items = [
        compared_run(root / f"<img src=x onerror=alert({k})>\u202e|*_`[x](y)", domains, strategy=everything,
                     source=everything, seed=k, control=domains, source_nll=domains)
        for k in range(2)
    ]  # fmt: skip
    items.append(compared_run(root / "<script>b", domains, data=everything, source=everything, strategy="o"))
    items.append(compared_run(root / "'onload='", domains, state=everything, source=everything))
    return items


def test_hostile_names_are_shown_and_cannot_act(root, tmp_path, monkeypatch):
    items = hostile_items(root)
    write_comparison(items, tmp_path / "<b>out")
    document = (tmp_path / "<b>out" / "compare.html").read_text()
    check_inert(document)
    assert "<script>b" in Page(document).text
    table = (tmp_path / "<b>out" / "compare.md").read_text()
    assert "<img" not in table
    assert "<script" not in table
    assert "\u202e" not in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert len(bars) == 1, "a name has broken the table"
    monkeypatch.setattr(report_html, "escape", str)
    with pytest.raises(AssertionError):
        check_inert(render_report_of(items))


def render_report_of(items):
    from scionlm.report.compare_page import compare_page

    return compare_page(compared(items), "x")


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "manifest.json", "metrics.jsonl"])
def test_a_broken_file_is_named_and_nothing_is_written(root, tmp_path, name):
    run = compared_run(root / "a", pair(4.0, 3.0))
    (run / name).write_text('{"format_version": 99}\n' if name != "config.yaml" else "a: [1")
    with pytest.raises(DataError, match=name):
        write_comparison([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_set_against_its_own_control_though_an_equal_one_stands_elsewhere(root, tmp_path):
    """Two rates, two strategies; controls are the same for both strategies and not for both rates."""
    items = [
        compared_run(root / f"{rate}-{name}", pair(4.0, 3.0), control=pair(level, level), strategy=f"{name}{rate}")
        for rate, level in (("slow", 5.5), ("fast", 6.5))
        for name in ("first", "spaced")
    ]
    record = write_comparison(items, tmp_path / "out")
    for rate, share in (("slow", 2 / 3), ("fast", 3 / 4)):
        for name in ("first", "spaced"):
            assert row_of(record, f"{rate}-{name}")["gap_closed"] == pytest.approx(share)
    assert sum(row["kind"] == "control" for row in record["rows"]) == 2


def test_the_same_runs_made_twice_are_not_sorted_into_the_better_and_the_worse(root, tmp_path):
    levels = {"one": (4.00, 4.11, 4.20), "two": (4.01, 4.10, 4.21)}
    items = [
        compared_run(root / sweep / f"x-seed{seed}", pair(level, level), seed=seed)
        for sweep, means in levels.items()
        for seed, level in enumerate(means)
    ]
    record = write_comparison(items, tmp_path / "out")
    rows = [set(group["rows"]) for group in record["groups"]]
    assert {frozenset(one) for one in rows} == {
        frozenset(f"{sweep}/x-seed{seed}" for seed in range(3)) for sweep in levels
    }
    assert "in 2 of 3 of them: no winner is known" in record["summary"][1]


def test_groups_of_one_name_keep_their_own_distance(root, tmp_path):
    items = [compared_run(root / f"best-seed{s}", pair(3.0, 3.0), seed=s, strategy="a") for s in (0, 1)]
    items += [compared_run(root / "s" / f"y-seed{s}", pair(3.3, 3.3), seed=s, strategy="b") for s in (0, 1)]
    items += [compared_run(root / "t" / f"y-seed{s}", pair(5.0, 5.0), seed=s, strategy="c") for s in (0, 1)]
    record = write_comparison(items, tmp_path / "out")
    names = named(record["groups"])
    assert len(set(names)) == 3
    table = (tmp_path / "out" / "compare.md").read_text()
    far = next(line for line in table.splitlines() if "5.000 ± 0.000" in line)
    assert "| 2.000 ± 0.000 |" in far
    assert {row["group"] for row in record["rows"]} == set(names)


def test_a_root_source_that_was_measured_otherwise_does_not_stand_in(root, tmp_path):
    base = compared_run(root / "base", pair(4.0, 3.0), seq_len=32, num_tokens=100, source_nll=pair(1.0, 1.0))
    items = [
        compared_run(
            root / name, pair(level, level), strategy=name, source=str(base / "model"), source_nll=pair(3.0, 2.0)
        )
        for name, level in (("a", 4.0), ("b", 4.5))
    ]
    record = write_comparison([base, *items], tmp_path / "out")
    assert row_of(record, "base")["not_comparable"]
    assert record["source"]["mean"] == pytest.approx(2.5)


def test_seeds_that_were_measured_at_other_steps_are_one(root, tmp_path):
    items = [compared_run(root / f"a-seed{s}", pair(4.0, 3.0 + s), seed=s) for s in (0, 1)]
    for every, folder in zip((410, 411), items, strict=True):
        config = json.loads((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(json.dumps(config | {"evaluate": {"every": every}}))
    assert [group["n"] for group in write_comparison(items, tmp_path / "out")["groups"]] == [2]


def test_a_report_takes_no_other_files_place(root, tmp_path):
    run = compared_run(root / "a", pair(4.0, 3.0), strategy="a")
    other = compared_run(root / "b", pair(4.0, 3.5), strategy="b")
    for name in ("page.html", "page.md"):
        mine = tmp_path / name
        write_report(run, mine)
        write_report(run, mine)  # its own, drawn again
        mine.write_text("# years of work\n")
        with pytest.raises(UsageError, match=f"{name} is there already"):
            write_report(run, mine)
        assert mine.read_text() == "# years of work\n"
    (run / "report.html").write_text("a page of an older version")
    assert "years" not in write_report(run).read_text()
    write_report(run, tmp_path / "named.md")
    with pytest.raises(UsageError, match="there already"):
        write_report(other, tmp_path / "named.md")


def test_words_that_older_yaml_takes_for_something_else_stay_words(root, tmp_path):
    for name in ("a", "b"):
        run = compared_run(root / name, pair(4.0, 3.0), strategy=name)
        config = json.loads((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(
            dump_yaml(config | {"data": {"mixture": {"no": 1, "en": 1}, "dir": "2024-05-01"}})
        )
    assert len(write_comparison([root / "a", root / "b"], tmp_path / "out")["rows"]) == 2


def test_a_comparison_that_was_killed_half_way_can_be_made_again(root, tmp_path):
    run = compared_run(root / "a", pair(4.0, 3.0), strategy="a")
    out = tmp_path / "out"
    api.compare([run], out)
    (out / "compare.json").unlink()
    assert api.compare([run], out)["rows"]
    (out / "compare.json").unlink()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        api.compare([run], out)
