"""What the page of an analysis promises: it says what the numbers say, draws every state, and nothing in it can act."""

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import test_report
from analysis_records import Record, drawings, look_of, maps_of, picture_in, record_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, check_page, words

from scionlm.core.errors import DataError
from scionlm.report.analysis_beside import places
from scionlm.report.analysis_page import analysis_page, write_analysis_page
from scionlm.report.analysis_read import Look, named_indices

SECTIONS = ("attention", "worth", "agree", "keep", "beside", "method", "words")


def said(record: Record, maps: Record | None = None) -> str:
    return words(check_page(analysis_page(record, maps or {}, "out")))


def lead_of(document: str) -> str:
    found = re.search(r'<p class="lead">(.*?)</p>', document)
    assert found
    return re.sub("<[^>]+>", "", found[1])


def sections_of(document: str) -> list[str]:
    return re.findall(r'<section aria-labelledby="([^"]+)">', document)


def test_attention_is_drawn_as_it_is() -> None:
    document = analysis_page(record_of(), maps_of(4), "out")
    check_page(document)
    (root,) = drawings(document)["Attention of layer 2, head 1"]
    full, half, third = 255, round(255 * 0.5**0.5), round(255 * (1 / 3) ** 0.5)
    assert picture_in(root) == [[full, 0, 0], [half, half, 0], [third, third, third]]
    assert "head 1<br>rank 6.00" in document


def test_a_folder_is_read_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text(json.dumps(record_of(name="x")))
    out = write_analysis_page(tmp_path)
    assert out == tmp_path / "report.html"
    assert "What attention looks like" not in out.read_text("utf-8")
    (tmp_path / "maps.json").write_text(json.dumps(maps_of(4)))
    assert "What attention looks like" in write_analysis_page(tmp_path).read_text("utf-8")
    for broken in ("{", json.dumps({"format_version": 99}), json.dumps([])):
        (tmp_path / "maps.json").write_text(broken)
        with pytest.raises(DataError):
            write_analysis_page(tmp_path)
    with pytest.raises(DataError, match="missing"):
        write_analysis_page(tmp_path / "elsewhere")


LEADS = {
    "none": ((), "No layer is lazy on sequences of 96 tokens, but 50% of its 8 heads are of rank 1; there is no lazy"),
    "one": ((1,), "1 of 4 layers is lazy (layer 1) on sequences of 96 tokens, and 62% of its 8 heads are of rank 1, "),
    "group": ((2, 3), "2 of 4 layers are lazy (layers 2, 3) on sequences of 96 tokens, and 75% of its 8 heads are of"),
}


@pytest.mark.parametrize("case", LEADS)
def test_the_lead_says_what_was_found(case: str) -> None:
    lazy, want = LEADS[case]
    lead = lead_of(analysis_page(record_of(lazy=lazy), {}, "out"))
    assert lead.startswith(want)
    assert ("the second half of the layers is a lazy group (AvgRank 1.20)" in lead) == (case == "group")
    assert ("there is no lazy group" in lead) == (case != "group")
    assert ("60% of these in the first half of the layers" in lead) == (case == "one")


def test_a_lazy_group_at_the_end_is_said_where_no_half_is_one() -> None:
    record = record_of(12, 2, lazy=(9, 10, 11))
    record["overall"]["lazy_group_from"] = 9
    assert "; layers 9 to 11 are a lazy group." in lead_of(analysis_page(record, {}, "out"))


def test_lazy_is_called_not_worthless_only_where_it_costs_more_than_most() -> None:
    dear, cheap = said(record_of(lazy=(0,))), said(record_of(lazy=(3,)))
    assert "Without layer 0 alone the loss is 1.000 nats higher, place 1 of 4" in dear
    assert "lazy does not mean worthless here" in dear
    assert "Without layer 3 alone the loss is 0.250 nats higher, place 4 of 4" in cheap
    assert "worthless" not in cheap
    assert "the lazy layers change the loss by 0.292 nats at the median, the others by 0.750" in said(
        record_of(lazy=(2, 3))
    )


def other_of(lazy: tuple[int, ...], layers: int = 4, nll: float = 3.5, name: str = "child") -> Record:
    other = look_of(layers, 2, lazy, name)
    other["overall"]["nll"] = nll
    return other


AGAINST = {
    "gone": (
        (1,),
        (),
        "In child there is no lazy layer (of 4), here 1 lazy layer (of 4); 50% of its heads are of rank 1",
    ),
    "new": ((), (1, 2), "child has 2 lazy layers (of 4), where here there is none (of 4)"),
    "fewer": ((1, 2), (0,), "In child a smaller share of layers is lazy: 1 of 4, here 2 of 4"),
    "more": ((1,), (0, 3), "In child a larger share of layers is lazy: 2 of 4, here 1 of 4"),
    "as many": ((1,), (2,), "In child the same share of layers is lazy: 1 of 4, here 1 of 4"),
    "neither": ((), (), "In child no layer is lazy either (of 4)"),
}


@pytest.mark.parametrize("case", AGAINST)
def test_what_the_other_model_has_is_said(case: str) -> None:
    here, there, want = AGAINST[case]
    text = said(record_of(lazy=here, against=other_of(there)))
    assert want in text
    assert not any(sentence in text for name, (*_, sentence) in AGAINST.items() if name != case)


def test_fewer_rank_1_heads_are_not_called_better_where_the_loss_is_higher() -> None:
    higher, lower = (said(record_of(lazy=(1,), against=other_of((), nll=nll))) for nll in (4.75, 2.5))
    caution = "the one with fewer rank-1 heads is not the one with the lower loss"
    assert "Its loss is 4.75, here 3.50: " + caution in higher
    assert "Its loss is 2.50, here 3.50." in lower
    assert caution not in lower


def test_sections_are_there_exactly_where_their_numbers_are() -> None:
    assert sections_of(analysis_page(record_of(), {}, "out")) == [s for s in SECTIONS if s != "beside"]
    assert sections_of(analysis_page(record_of(against=other_of(())), {}, "out")) == list(SECTIONS)
    bare = record_of(suggestions=[], criteria=[], correlation=[], similarity=[], angular=[], domains=[], lengths=[])
    document = analysis_page(bare, {}, "out")
    check_page(document)
    assert sections_of(document) == ["attention", "worth", "method", "words"]
    for title in ("Does it depend on the text?", "Does it depend on the length?", "How alike the states", "All crit"):
        assert title in analysis_page(record_of(), {}, "out")
        assert title not in document


def test_greedy_removal_is_drawn_where_it_was_done() -> None:
    title = "Loss as layers are taken out one after another"
    assert title not in analysis_page(record_of(), {}, "out")
    document = analysis_page(record_of(greedy={"order": [2, 0], "nll": [3.75, 5.5]}), {}, "out")
    assert "2 (3.75), 0 (5.50)" in words(check_page(document))
    marks = [each.text for each in drawings(document)[title][0].iter("title")]
    assert marks[1:] == ["layers taken out 0: 3.50", "layers taken out 1: 3.75", "layers taken out 2: 5.50"]


def test_how_it_was_measured_is_said() -> None:
    text = said(record_of())
    for fact in (
        "datacorpus/mine",
        "splittrain",
        "seed of the sample11",
        "tokens of a sequence96",
        "sequences10",
        "for losses and gradients7, the first of them",
        "tau, for ranks0.9",
        "eta, for masses0.85",
        "lazy below a MaxRank of 1 +0.5",
        "ranks at a tie with tau3 of 80 matrices",
        "precisionfp32",
        "attention and layers12.5 s",
        "greedy removal2 min 5 s",
    ):
        assert fact in text
    assert "token ids that were passed in" in said(record_of(data=None))


def test_the_length_stands_wherever_a_rank_does() -> None:
    document = analysis_page(record_of(against=other_of(())), {}, "out")
    titles = [title for title in drawings(document) if re.search("MaxRank|[Mm]ass|Rank k", title)]
    assert len(titles) >= 9
    for title in titles:
        assert "96 tokens" in title or title.endswith("by length"), title


def test_commands_can_be_copied_and_no_name_can_run_in_a_shell() -> None:
    assert "scion inherit tiny --keep 0-1 -o OUT" in said(record_of())
    for name in ("a; rm -rf ~", "$(reboot)", "-o", "x\ny", "`id`", "\u202eevil"):
        record = record_of()
        record["model"]["name"] = name
        text = said(record)
        assert "scion inherit MODEL --keep 0-1 -o OUT" in text
        assert f"scion inherit {name}" not in text
    record = record_of()
    record["model"]["name"] = "my models/a"
    assert "scion inherit 'my models/a' --keep 3 -o OUT" in said(record)
    record["suggestions"] = [{"by": "first", "keep": "0-1; rm -rf ~", "num_layers": 2, "why": ""}]
    assert "rm -rf" not in said(record)


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("0-2,5", [0, 1, 2, 5]),
        ("3", [3]),
        ("", None),
        (None, None),
        ("5-2", None),
        ("0-99999", None),
        ("9", None),
        ("1-2-3", None),
        ("\u0663", None),
        ("-1", None),
    ],
)
def test_layers_are_read_as_people_write_them(written: str | None, want: list[int] | None) -> None:
    assert named_indices(written, 9) == want


def test_a_cell_says_its_value() -> None:
    document = analysis_page(record_of(3, 2), {}, "out")
    (wide, narrow) = drawings(document)["Rank k* of each head, sequences of 96 tokens"]
    titles = [rect.findtext("title") for rect in wide.iter("rect") if rect.find("title") is not None]
    assert titles == [f"layer {k}, head {h}: {1 + k + h / 100:.3g}" for h in range(2) for k in range(3)]
    assert len(list(narrow.iter("rect"))) == len(list(wide.iter("rect")))


def steps(*indices: int, name: str = "tiny", total: int = 4) -> list[list[Record]]:
    return [[{"name": name, "index": index, "of": total}] for index in indices]


def test_layers_of_two_models_stand_where_they_came_from() -> None:
    source, child = record_of(), other_of((), layers=2)
    child["model"]["origins"] = steps(0, 3)
    assert places(Look(source), Look(child)) == ([0, 1, 2, 3], [0, 3], ["0", "1", "2", "3"], "layer of tiny")
    assert places(Look(child), Look(source)) == ([0, 3], [0, 1, 2, 3], ["0", "1", "2", "3"], "layer of tiny")
    first, second = other_of((), layers=2), other_of((), layers=3, name="sister")
    first["model"]["origins"], second["model"]["origins"] = steps(5, 6, total=8), steps(0, 1, 7, total=8)
    first["model"]["origins"][0].insert(0, {"name": "between", "index": 1, "of": 3})
    mine, theirs, labels, _ = places(Look(first), Look(second))
    assert (mine, theirs, len(labels)) == ([5, 6], [0, 1, 7], 8)
    strange = other_of((), layers=2)
    strange["model"]["origins"] = steps(0, 3, name="another model")
    assert places(Look(source), Look(strange))[1] == [0, 100]  # in percent of the depth
    assert places(Look(source), Look(other_of(())))[1] == [0, 1, 2, 3]


def test_both_models_stand_side_by_side() -> None:
    child = other_of((0,), layers=2, nll=4.25)
    child["model"]["origins"] = steps(0, 3)
    document = analysis_page(record_of(against=child), {}, "out")
    check_page(document)
    (wide, _) = drawings(document)["MaxRank of both, sequences of 96 tokens"]
    titles = [each.text for each in wide.iter("title") if (each.text or "").startswith("child")]
    assert titles == ["child, layer of tiny 0: 1.20 ± 2.00", "child, layer of tiny 3: 31.0 ± 2.00"]
    assert "L" not in next(each.get("d", "") for each in wide.iter("path") if each.get("class") == "line slim child")
    rows = re.search(r'id="beside-table".*?</table>', document, re.DOTALL)
    assert rows
    cells = re.sub(r"<[^>]+>", "|", rows[0])
    assert "|loss (nats)||3.50||4.25|" in cells
    assert "|lazy layers||0 of 4||1 of 2|" in cells


def test_a_model_of_one_layer_and_one_head_is_drawn() -> None:
    record = record_of(1, 1, against=other_of((), layers=1))
    text = said(record, maps_of(1))
    assert "No layer is lazy on sequences of 96 tokens, and its head is not of rank 1" in text
    assert "Layer 0" in text
    assert "not finite" not in text


def test_a_large_model_makes_a_page_that_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_report, "LIMIT", 6_000_000)
    record = record_of(80, 64, lazy=tuple(range(40, 80)))
    begin = time.process_time()
    document = analysis_page(record, maps_of(80, 40), "out")
    assert time.process_time() - begin < 5
    check_page(document)
    assert "layer 79, head 63: 80.6" in document


def test_nothing_in_the_files_can_act() -> None:
    for text in HOSTILE:
        record = record_of(lazy=(1,), against=other_of((2,), name=text))
        record["model"] |= {key: text for key in ("name", "revision", "license", "weights_sha256", "model_type")}
        record["data"] = dict.fromkeys(("path", "fingerprint", "split"), text)
        record["device"], record["seconds"] = {"name": text}, {text: 3.0}
        record |= {"precision": text, "layer_scores_by": text}
        for one in (*record["domains"], *record["groups"], *record["criteria"]):
            one["name"] = text
        for one in record["criteria"]:
            one["what"] = text
        record["suggestions"] = [{"by": text, "keep": text, "why": text, "num_layers": 2}] * 2
        record["against"]["model"]["origins"] = steps(0, 1, 2, 3, name=text)
        check_page(analysis_page(record, maps_of(4), text))


VALUES = (
    None,
    True,
    -1,
    10**400,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "text",
    [],
    {},
    [[]],
    [None, "x", {}, [1]],
    {"a": 1},
    [1e308, -1e308, 3],
    [[1, 2], [3], "x", None],
    10**15,
)


def paths_of(record: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where something stands in a record, only the first of each list."""
    found = [prefix] if prefix else []
    items = record.items() if isinstance(record, dict) else enumerate(record[:1]) if isinstance(record, list) else ()
    return found + [path for key, value in items for path in paths_of(value, (*prefix, key))]


FULL = record_of(lazy=(1,), against=other_of((2,)), greedy={"order": [2, 0], "nll": [3.75, 5.5]})
FULL["against"]["model"]["origins"] = steps(0, 1, 2, 3)
PATHS = paths_of(FULL)


def put(record: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value there, or take away what is there; nothing where an earlier change left no such place."""
    for key in path[:-1]:
        there = key in record if isinstance(record, dict) else isinstance(record, list) and key == 0 and record
        record = record[key] if there else None
    if isinstance(record, dict) or (isinstance(record, list) and record and path[-1] == 0):
        record[path[-1]] = copy.deepcopy(value)
        if value == "gone":
            del record[path[-1]]


def test_whatever_stands_in_a_place_the_page_is_drawn() -> None:
    assert len(PATHS) > 150
    for k, path in enumerate(PATHS):
        for value in VALUES[k % 5 :: 5] if len(path) == 1 else VALUES[k % len(VALUES) :][:1]:
            record = copy.deepcopy(FULL)
            put(record, path, value)
            analysis_page(record, {}, "out")
    check_page(analysis_page(FULL, {}, "out"))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from((*VALUES, "gone"))), max_size=8))
def test_however_broken_a_record_is_the_page_is_sound(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    record = copy.deepcopy(FULL)
    for path, value in changes:
        put(record, path, value)
    check_page(analysis_page(record, {"maps": changes and [changes[0][1]]}, "out"))


@pytest.mark.parametrize("number", [1e308, -1e308, float("nan"), float("inf"), 10**400])
def test_numbers_that_no_axis_holds_are_taken_as_missing(number: float) -> None:
    text = json.dumps(FULL)
    record = json.loads(re.sub(r"(?<=: )-?\d+\.\d+", json.dumps(number), text))
    assert record["overall"]["nll"] == number or number != number
    assert "loss in nats, on 7 sequences3.50" in said(FULL)
    assert "loss in nats, on 7 sequences\u2013" in said(record)


@pytest.mark.parametrize("maps", [{"maps": 3}, {"maps": [None, 1]}, {"maps": [{"layer": 0, "attention": [[1, 2]]}]}])
def test_maps_that_are_none_are_left_out(maps: Record) -> None:
    assert "What attention looks like" not in said(record_of(), maps)


def test_a_record_with_nothing_in_it_is_drawn() -> None:
    text = said({})
    assert "The analysis does not say whether attention has collapsed." in text
    assert "a model without a name" in text


def test_more_than_a_page_can_hold_is_cut_and_said_to_be() -> None:
    record = record_of()
    record["layers"] = record["layers"] * 1250
    record["domains"] = [{"name": f"domain {k}", "max_rank": [3.0]} for k in range(3000)]
    begin = time.process_time()
    document = analysis_page(record, {}, "out")
    assert time.process_time() - begin < 5
    assert len(document) < 6_000_000
    assert "The first 400 layers of 5,000 are drawn" in document
    assert "; the first 40 of 3,000" in document
