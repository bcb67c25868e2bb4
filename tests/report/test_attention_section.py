"""Attention before and after on the page of a run: the numbers of its analysis, and the command that makes one."""

import copy
import json
import re
import shlex

import pytest
from analysis_records import drawings, look_of, record_of
from test_analysis_page import FULL, PATHS, VALUES, put, steps
from test_report import HOSTILE, Page, check_inert, check_page, words

from scionlm.core.errors import DataError
from scionlm.report import render_report

TITLE = "MaxRank of both, sequences of 96 tokens"
KEEP = [0, 4, 8, 12, 17, 21, 25, 29]


def analysis_of(layers=8, source="smollm2-135m", origins=True, lazy=(6, 7)):
    """Return an analysis of the child of `run_folders`, of 8 layers, beside its source of 30."""
    record = record_of(layers, 2, lazy, against=look_of(30, 2, (25, 29), source))
    record["model"]["name"] = "runs/demo/model"
    if origins:
        record["model"]["origins"] = steps(*KEEP, name="smollm2-135m", total=30)
    return record


def put_analysis(run, record, name="analysis"):
    (run / name).mkdir()
    (run / name / "analysis.json").write_text(json.dumps(record))


def section_of(document):
    """Return the section as a document of its own; empty where there is none."""
    check_page(document)
    _, found, rest = document.partition('<section aria-labelledby="attention">')
    return rest.partition("</section>")[0] if found else ""


def command_on(document):
    found = re.search(r"<code>(scion analyze .*?)</code>", document)
    return words(Page(found[1])) if found else None


def test_each_inherited_layer_stands_beside_the_one_it_was(make_run):
    run = make_run()
    put_analysis(run, analysis_of())
    section = section_of(render_report(run))
    rows = re.findall(r'<th scope="row">(\d+)</th>((?:<td>.*?</td>)+)', section)
    cells = [[int(k), *re.findall(r"<td>(.*?)</td>", row)] for k, row in rows]
    # A rank is 30 + its layer, 1.2 where that is lazy; a mass is half of it.
    ranks = [(1.2 if i in (25, 29) else 30.0 + i, 1.2 if k in (6, 7) else 30.0 + k) for k, i in enumerate(KEEP)]
    assert [(row[0], row[1]) for row in cells] == [(k, str(i)) for k, i in enumerate(KEEP)]
    for (before, after), row in zip(ranks, cells, strict=True):
        change = after - before
        shown = "0.00" if change == 0 else f"{change:+.2f}".replace("-", "\u2212")
        assert row[2:5] == [f"{before:.2f}", f"{after:.2f}", shown]
        assert row[5:7] == [f"{before / 2:.2f}", f"{after / 2:.2f}"]
    (wide, _) = drawings(section)[TITLE]
    titles = [each.text for each in wide.iter("title")]
    assert "child, layer of smollm2-135m 29: 1.20 \u00b1 2.00" in titles
    assert "source, layer of smollm2-135m 29: 1.20 \u00b1 2.00" in titles


def test_the_sentence_counts_what_the_table_shows(make_run):
    run = make_run()
    put_analysis(run, analysis_of())
    said = words(Page(section_of(render_report(run))))
    before = [30, 34, 38, 42, 47, 51, 1.2, 1.2]
    after = [30, 31, 32, 33, 34, 35, 1.2, 1.2]
    assert (
        "Of the 8 layers that came from the source, MaxRank is higher than there in 0 and lower in 5; the mean went "
        f"from {sum(before) / 8:.2f} to {sum(after) / 8:.2f}."
    ) in said
    assert "2 of 30 (25, 29) in the source, 2 of 8 (6, 7) in the child" in said
    assert "cutting and training together" in said


def test_a_source_under_another_name_is_known_by_what_the_run_kept(make_run):
    run = make_run()
    put_analysis(run, analysis_of(source="/models/the same"))
    section = section_of(render_report(run))
    assert "layer of /models/the same 29: 1.20" in section
    assert len(re.findall(r'<th scope="row">\d', section)) == 8


def test_layers_that_are_not_the_sources_get_no_rows(make_run):
    run = make_run(inherit={"init": "random", "keep": KEEP})
    put_analysis(run, analysis_of(origins=False))
    section = section_of(render_report(run))
    assert "attention-table" not in section
    assert "Of the 8 layers" not in section
    assert TITLE in drawings(section)


@pytest.mark.parametrize("record", [record_of(30), analysis_of(layers=4, origins=False)])
def test_an_analysis_of_something_else_is_not_shown(make_run, record):
    """As one that a measured strategy leaves there, of the source alone."""
    run = make_run()
    put_analysis(run, record)
    assert section_of(render_report(run)) == ""


def test_the_other_folder_counts_where_the_first_is_taken(make_run):
    run = make_run()
    put_analysis(run, record_of(30))
    command = command_on(render_report(run))
    assert command == ("scion analyze RUN/model --against smollm2-135m --data runs/demo/data -o RUN/analysis-child")
    put_analysis(run, analysis_of(), "analysis-child")
    document = render_report(run)
    assert "attention-table" in section_of(document)
    assert command_on(document) is None


def test_an_analysis_that_was_stopped_goes_on_where_it_is(make_run):
    run = make_run()
    (run / "analysis").mkdir()
    (run / "analysis" / "settings.json").write_text("{}")
    assert str(command_on(render_report(run))).endswith(" -o RUN/analysis")


def test_the_command_is_named_where_it_can_be_run(make_run):
    run = make_run()
    document = render_report(run)
    assert section_of(document) == ""
    assert command_on(document) == (
        "scion analyze RUN/model --against smollm2-135m --data runs/demo/data -o RUN/analysis"
    )


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"inherit": {"init": "random"}}, None),
        ({"source": None}, "recipe: scratch\n"),
        ({"state": "stopped"}, None),
    ],
)
def test_there_is_no_command_without_a_model_or_a_source(make_run, changes, config):
    run = make_run(**changes)
    if config:
        (run / "config.yaml").write_text(config)
    assert command_on(render_report(run)) is None


def test_what_stands_in_the_command_cannot_act(make_run):
    run = make_run()
    (run / "config.yaml").write_text(json.dumps({"source": "a; rm -rf /'<b>"}))
    document = render_report(run)
    check_inert(document)
    command = command_on(document)
    assert command is not None
    assert shlex.split(command)[4] == "a; rm -rf /'<b>"


def test_an_analysis_that_is_broken_is_named(make_run):
    run = make_run()
    put_analysis(run, {})
    (run / "analysis" / "analysis.json").write_text("{")
    with pytest.raises(DataError, match=r"analysis\.json"):
        render_report(run)


def test_hostile_names_are_text(make_run):
    run = make_run()
    bad = " ".join(HOSTILE)
    record = analysis_of(source=bad)
    record["model"]["name"] = bad
    record["model"]["origins"] = steps(*KEEP, name=bad, total=30)
    put_analysis(run, record)
    document = render_report(run)
    check_inert(document)
    assert "attention-table" in document


def test_whatever_stands_in_a_place_the_page_is_drawn(make_run):
    run = make_run(model={"num_hidden_layers": 4}, inherit={"keep": [0, 1, 2, 3]})
    put_analysis(run, FULL)
    assert section_of(render_report(run))
    named = ("model", "overall", "layers", "against", "seq_len")
    for k, path in enumerate(path for path in PATHS if path[0] in named):
        record = copy.deepcopy(FULL)
        put(record, path, VALUES[k % len(VALUES)])
        (run / "analysis" / "analysis.json").write_text(json.dumps(record))
        render_report(run)
