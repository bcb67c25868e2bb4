"""What the report promises: every state of a run is drawn, the numbers are the run's, and nothing in it can act."""

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import run_folders
from hypothesis import given
from hypothesis import strategies as st

from scionlm.core.errors import DataError, UsageError
from scionlm.report import html as report_html
from scionlm.report import render_report, write_report
from scionlm.report.axes import LARGEST, nice_ticks, spread, tick_labels
from scionlm.report.collect import read_run
from scionlm.report.findings import find
from scionlm.report.html import escape
from scionlm.report.wording import article, count, duration, index_ranges, nats, percent, quantity, size

MakeRun = Callable[..., Path]

VOID = {"br", "link", "meta"}
LIMIT = 500_000

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\"' onload='alert(3)",
    "</title></style><b>",
    "javascript:alert(4)",
    "\x1b[31mred\x00",
    "\u202egnp.exe\u2066",
    "http://example.com/x",
    "${7*7}{{7*7}}[/x]",
)


class Page(HTMLParser):
    """A strict reader: every element closed in order, all attributes, text and comments kept."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def check_page(document: str) -> Page:
    """Check what holds for every page, and return it as read."""
    page = Page(document)
    assert not page.open
    assert page.tags.count("h1") == 1
    assert {"header", "main", "footer"} <= set(page.tags)
    assert not {"script", "img", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert ("html", "lang", "en") in page.attributes
    policies = [
        v for t, n, v in page.attributes if t == "meta" and n == "content" and v.startswith("default-src 'none'")
    ]
    assert len(policies) == 1
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "style"}
        assert not re.search(r"https?:|//|javascript:", value), value
    assert not re.search(r"@import|url\(|https?:", document.partition("<style>")[2].partition("</style>")[0])
    idents = [value for _, name, value in page.attributes if name == "id"]
    assert len(idents) == len(set(idents))
    referred = {
        word for _, n, v in page.attributes if n in {"aria-labelledby", "aria-describedby"} for word in v.split()
    }
    assert referred <= set(idents)
    drawings = re.findall(r"<svg.*?</svg>", document, flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("aria-hidden") or (root.find("title") is not None and root.find("desc") is not None)
    assert len(document.encode()) < LIMIT
    return page


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_a_done_run_says_what_was_made_and_how_good_it_is(make_run: MakeRun) -> None:
    text = words(check_page(render_report(make_run())))
    assert "An 8-layer, 56.7M-parameter child of smollm2-135m (30 layers, 134.5M parameters)" in text
    assert "trained on 409,600 tokens, reaches 4.61 nats on held-out text" in text
    assert "the same shape from random weights, on the same tokens, reaches 7.90; the source has 3.60." in text
    assert "The child closes 77% of the gap between control and source. One seed (0), so no spread is known." in text
    assert "keeps 8 of 30 layers: 0, 4, 8, 12, 17, 21, 25, 29; strategy spaced" in text
    assert "scion run inheritune-mini train.steps=400 -o runs/demo" in text
    assert "windows of 256 + 1 tokens" in text
    assert "apache-2.0" in text


def test_the_numbers_on_the_page_are_those_of_the_result(make_run: MakeRun) -> None:
    run = make_run()
    text = words(check_page(render_report(run)))
    result = json.loads((run / "result.json").read_text())
    for model in (result["source"]["domains"], result["domains"], result["before"], result["control"]["domains"]):
        for loss in model.values():
            row = f"{nats(loss['nll'], 3)}{quantity(loss['perplexity'])}{nats(loss['bits_per_byte'], 3)}"
            assert row + f"{loss['num_tokens']:,}" in text
    assert f"{result['model']['num_parameters']:,}" in text
    found = find(read_run(run))
    means = [
        sum(loss["nll"] for loss in model.values()) / 3
        for model in (result["domains"], result["control"]["domains"], result["source"]["domains"])
    ]
    assert (found.child, found.control, found.source) == pytest.approx(tuple(means))
    assert found.gap_closed == pytest.approx((means[1] - means[0]) / (means[1] - means[2]))


def test_a_run_without_control_claims_no_gap(make_run: MakeRun) -> None:
    text = words(check_page(render_report(make_run(control=False))))
    assert "83% recovered" in text
    assert "control" not in text.lower()
    assert "closed" not in text


def test_a_child_beyond_its_source_has_not_closed_so_many_times_the_gap(make_run: MakeRun) -> None:
    run = make_run(control=False)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    for name, loss in result["source"]["domains"].items():
        loss["nll"] = result["domains"][name]["nll"] + 0.5
    run_folders.write_json(run / "result.json", result)
    run_folders.write_json(run / "source.json", {"format_version": 1, **result["source"]})
    text = words(check_page(render_report(run)))
    assert "beyond the source" in text
    assert "% recovered" not in text


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "the same command goes on from the last checkpoint."),
        ("stopped", "Exit code 75: stopped by a signal, after saving."),
        ("failed", "Exit code 3: training diverged. Message: the loss was not finite at step 120"),
        ("<b>odd", "a state that this version does not know"),
    ],
)
@pytest.mark.parametrize("control", [True, False])
def test_a_run_that_is_not_done_says_so(make_run: MakeRun, state: str, said: str, control: bool) -> None:
    text = words(check_page(render_report(make_run(state=state, control=control))))
    assert said in text
    assert "Step 120 of 400." in text
    assert "5.72" in text  # the last evaluation so far
    assert "No final losses" in text


def test_a_run_of_which_only_one_file_is_left_is_drawn(make_run: MakeRun) -> None:
    run = make_run(control=False)
    for name in ("manifest.json", "status.json", "metrics.jsonl", "result.json"):
        (run / name).unlink()
    text = words(check_page(render_report(run)))
    assert "no status.json" in text
    assert "No losses were recorded during training" in text
    assert "The command is not recorded" in text


@pytest.mark.parametrize("missing", sorted(set(run_folders.result(control=True)) - {"format_version"}))
def test_no_key_of_the_result_is_needed(make_run: MakeRun, missing: str) -> None:
    for value in (None, [], 7, "text", {"prose": None}, {"prose": {"nll": "bad"}}, [None, 3]):
        run = make_run(**{missing: value})
        check_page(render_report(run))
        for path in sorted(run.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        run.rmdir()


def test_losses_that_are_not_finite_leave_a_gap_and_are_named(make_run: MakeRun) -> None:
    lines = run_folders.metric_lines(6.1, 1.0)
    for line in lines:
        if 100 < line["step"] < 200 and "train/nll_nats" in line:
            line["train/nll_nats"] = None
        if line["step"] == 400:
            line["eval/code/nll_nats"] = 1e308
    run = make_run(domains={"prose": {"nll": 1e308}, "code": {"nll": 1e308}, "web": {"nll": None}})
    run_folders.write_metrics(run / "metrics.jsonl", lines)
    text = words(check_page(render_report(run)))
    assert "A gap in a line is a loss that was not finite." in text
    assert "nan" not in text


def test_a_resumed_run_counts_the_later_line_of_a_step(make_run: MakeRun) -> None:
    run = make_run(state="stopped", control=False)
    lines = run_folders.metric_lines(6.1, 1.0, 120)
    again = {"step": 120, "tokens": 122_880} | {f"eval/{name}/nll_nats": 5.25 for name in run_folders.DOMAINS}
    run_folders.write_metrics(run / "metrics.jsonl", [*lines, again])
    assert "was at 5.25 nats" in words(check_page(render_report(run)))


def hostile_run(make_run: MakeRun) -> Path:
    """Return a run in which every text is an attack, and every list far too long."""
    everything = " ".join(HOSTILE)
    domains = {f"{k} {bad}" * 9: {"nll": 3.0 + k, "num_tokens": 9} for k, bad in enumerate(HOSTILE * 8)}
    sample = {"prompt": everything, "texts": dict.fromkeys(["source", "child", everything], everything * 90)}
    run = make_run(
        name=everything,
        recipe=everything,
        source={"name": everything, "license": everything, "num_hidden_layers": 30, "domains": domains},
        inherit={"init": "source", "strategy": everything, "strategy_reason": everything, "keep": list(range(30))},
        domains=domains,
        samples=[sample] * 40,
    )
    manifest = run_folders.manifest() | {
        "scion_version": everything,
        "command": ["scion", *HOSTILE],
        "versions": {bad: bad for bad in HOSTILE},
        "source": {bad: bad for bad in HOSTILE},
        "data": {"dir": everything, "fingerprint": everything},
        "device": {"name": everything},
    }
    run_folders.write_json(run / "manifest.json", manifest)
    status: dict[str, Any] = {"state": everything, "message": everything * 50, "step": 1, "exit_code": 65}
    run_folders.write_json(run / "status.json", {"format_version": 1, **status})
    evaluation = {f"eval/{name}/nll_nats": loss["nll"] for name, loss in domains.items()}
    lines = [{"step": k, "tokens": k * 7, "train/nll_nats": 3.0, **evaluation} for k in range(300)]
    run_folders.write_metrics(run / "metrics.jsonl", lines)
    run_folders.write_metrics(run / "control" / "metrics.jsonl", lines)
    inert = "".join(character for character in everything if character.isprintable())
    (run / "config.yaml").write_text("# " + inert * 400, encoding="utf-8")
    return run


def check_inert(document: str) -> None:
    """Check that no hostile text reached the page as it was."""
    check_page(document)
    for raw in ("<script", "<img", "onload='", "</title></style>", "\x1b", "\x00", "\u202e", "\u2066"):
        assert raw not in document


def test_hostile_text_is_shown_and_cannot_act(make_run: MakeRun) -> None:
    document = render_report(hostile_run(make_run))
    check_inert(document)
    text = Page(document).text
    assert "</script><script>alert(1)</script>" in text
    assert r"\x1b[31mred\x00" in text
    assert r"\u202egnp.exe\u2066" in text


def test_the_check_for_hostile_text_fails_without_escaping(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hostile_run(make_run)
    monkeypatch.setattr(report_html, "escape", str)
    with pytest.raises(AssertionError):
        check_inert(render_report(run))


@given(st.text(st.characters(), max_size=60))
def test_escaped_text_reads_back_without_anything_invisible(text: str) -> None:
    shown = escape(text)
    assert not re.search(r"[<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    ElementTree.fromstring(f'<p a="{shown}">{shown}</p>')
    shown.encode("utf-8")


numbers = st.floats(-LARGEST, LARGEST, allow_nan=False)
ranges = st.one_of(
    st.tuples(numbers, numbers),
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e-12, 1e-12)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    numbers.map(lambda value: (value, value)),
    st.sampled_from([(0.0, 5e-324), (-5e-324, 5e-324), (1e16, 1e16 + 2), (-LARGEST, LARGEST), (0.0, 0.0)]),
)


@given(ranges, st.integers(1, 8))
def test_ticks_cover_the_range_and_are_few_and_increasing(ends: tuple[float, float], intervals: int) -> None:
    ticks = nice_ticks(*ends, intervals)
    assert ticks[0] <= min(ends)
    assert ticks[-1] >= max(ends)
    assert 2 <= len(ticks) <= 10
    assert all(a < b for a, b in itertools.pairwise(ticks))
    labels = tick_labels(ticks)
    assert len(labels) == len(ticks)
    # Beyond this many digits a label is rounded; no loss and no count is.
    if max(abs(tick) for tick in ticks) < 1e5 * (ticks[1] - ticks[0]):
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("end", [float("nan"), float("inf"), 1.1e300])
def test_an_axis_needs_finite_ends(end: float) -> None:
    with pytest.raises(ValueError, match="no axis"):
        nice_ticks(0.0, end)


@given(st.lists(st.floats(0, 100), max_size=6))
def test_labels_keep_their_distance(wanted: list[float]) -> None:
    placed = spread(wanted, [15.0] * len(wanted), 0, 100)
    ordered = sorted(placed)
    assert all(b - a > 14.999 for a, b in itertools.pairwise(ordered))
    assert sorted(range(len(wanted)), key=lambda k: placed[k]) == sorted(range(len(wanted)), key=lambda k: wanted[k])


def test_numbers_are_written_for_people() -> None:
    assert [count(n) for n in (999, 134_515_008, 999_960_000, 3.2e12)] == ["999", "134.5M", "1.00B", "3.20T"]
    assert [quantity(n) for n in (0.0312, 21.23, 4711.2)] == ["0.0312", "21.2", "4,711"]
    assert [percent(s) for s in (0, 0.001, 0.767, 0.999, 1, 1.2, -0.3)] == [
        *("0%", "under 1%", "77%", "over 99%", "100%", "120%", "-30%")
    ]
    assert [duration(s) for s in (8.25, 59.97, 725, 3600, 11_520, 200_000)] == [
        *("8.2 s", "1 min", "12 min 5 s", "1 h", "3 h 12 min", "2 d 7 h")
    ]
    assert [size(n) for n in (12, 1.84e9, None)] == ["12 bytes", "1.8 GB", None]
    assert [article(n) for n in (8, 11, 18, 80, 1, 12, 110, 8000, 11_000)] == ["an"] * 4 + ["a"] * 3 + ["an"] * 2
    assert index_ranges([0, 1, 2, 5, 7, 8]) == "0\u20132, 5, 7, 8"


def test_the_page_is_written_beside_the_run_or_where_asked(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "other.html").read_text("utf-8") == (run / "report.html").read_text("utf-8")
    with pytest.raises(UsageError, match="is a folder"):
        write_report(run, tmp_path)


def test_what_is_no_run_or_is_broken_is_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        render_report(tmp_path / "absent")
    with pytest.raises(UsageError, match="is not a run folder"):
        render_report(tmp_path)
    run = make_run()
    for name, content in (
        ("config.yaml", "a: [1"),
        ("result.json", "{"),
        ("manifest.json", '{"format_version": 99}'),
        ("metrics.jsonl", '{"format_version": 1}\n{"step": \n{}\n'),
    ):
        before = (run / name).read_text()
        (run / name).write_text(content)
        with pytest.raises(DataError, match=name):
            render_report(run)
        (run / name).write_text(before)


def test_a_child_whose_control_is_still_trained_is_not_the_end(make_run: MakeRun) -> None:
    """Its result is there by then, the control's is not."""
    run = make_run()
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    run_folders.write_json(run / "result.json", result | {"control": None})
    for state, verb in (("running", "is at"), ("stopped", "was at")):
        run_folders.write_json(run / "status.json", {"format_version": 1, "state": state, "exit_code": 0, "step": 400})
        run_folders.write_metrics(run / "control" / "metrics.jsonl", run_folders.metric_lines(7.2, 4.3, 40))
        text = words(check_page(render_report(run)))
        assert "The child closes" not in text
        assert "on the same tokens" not in text
        assert re.search(rf"the same shape from random weights, after [\d.,k]+ tokens, {verb} ", text)


def test_the_page_is_named_for_the_folder_and_not_for_the_models_role(make_run: MakeRun) -> None:
    for state in ("done",):
        assert "<h1>demo</h1>" in re.sub(r"<(/?)bdi[^>]*>", "", render_report(make_run(state=state)))


def test_steps_are_counted_to_where_the_metrics_end_and_over_all_stages(make_run: MakeRun) -> None:
    run = make_run(state="failed", control=False)
    status = json.loads((run / "status.json").read_text())
    run_folders.write_json(run / "status.json", status | {"step": 100})  # the last checkpoint
    stages = [{"name": name, "steps": 200} for name in ("a", "b", "c")]
    run_folders.write_json(run / "plan.json", {"format_version": 1, "stages": stages})
    assert "Step 120 of 600." in words(check_page(render_report(run)))


def test_what_changed_on_the_way_is_told(make_run: MakeRun) -> None:
    run = make_run()
    manifest = json.loads((run / "manifest.json").read_text())
    changes = [{"at": "2026-11-21", "changed": ["device.kind (cpu -> cuda)", "versions.numpy (2.3 -> 2.4)"], "to": {}}]
    assert "went on with" not in words(check_page(render_report(run)))
    run_folders.write_json(run / "manifest.json", manifest | {"changes": changes})
    text = words(check_page(render_report(run)))
    assert "device.kind (cpu -> cuda), versions.numpy (2.3 -> 2.4) (2026-11-21)" in text


def test_a_run_whose_source_is_not_known_yet_is_not_said_to_have_none(make_run: MakeRun) -> None:
    run = make_run(state="running", control=False)
    config = (run / "config.yaml").read_text().replace("source: smollm2-135m", "reference: {model: {shape: x}}")
    (run / "config.yaml").write_text(config)
    text = words(check_page(render_report(run)))
    assert "What it was made from is not recorded yet." in text
    assert "random weights" not in text
