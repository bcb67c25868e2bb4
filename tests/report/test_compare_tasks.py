"""Tasks in a comparison: paired item by item, beside what papers report, and nothing claimed of other items."""

import json
import random

import pytest
from compared_folders import compared_run, pair
from test_report import HOSTILE, check_page, words

from scionlm.core.records import read_json
from scionlm.evaluation.paired_scores import paired_scores
from scionlm.evaluation.suites import suites
from scionlm.report import scored_models, write_comparison
from scionlm.report.compare import compared
from scionlm.report.compare_page import compare_page
from scionlm.report.compare_table import to_markdown
from scionlm.report.published import published

N = 200


def outcomes(share, seed):
    rng = random.Random(seed)
    return "".join(str(int(rng.random() < share)) for _ in range(N))


def scored(scores, sha="same"):
    """Return what an evaluation says of tasks, by the outcomes of their items."""
    tasks, items = {}, {}
    for name, outcome in scores.items():
        share = outcome.count("1") / N
        stderr = (share * (1 - share) / (N - 1)) ** 0.5
        tasks[name] = {"metric": "acc", "acc": share, "acc_stderr": stderr, "num_items": N, "chance": 0.25}
        items[name] = {"metric": "acc", "scores": outcome, "sha256": sha}
    return {"tasks": tasks, "items": items}


def with_scores(folder, child, source=None):
    path = folder / "result.json"
    result = json.loads(path.read_text()) | child
    if source is not None:
        result["source"] |= source
    path.write_text(json.dumps(result))
    return folder


@pytest.fixture
def three(tmp_path):
    hard = outcomes(0.5, 0)
    better = "".join("1" if k % 10 == 0 else bit for k, bit in enumerate(hard))
    source = scored({"cloze": outcomes(0.9, 3), "words": outcomes(0.8, 4)})
    return [
        with_scores(compared_run(tmp_path / "good", pair(4.0, 3.0), strategy="a"),
                    scored({"cloze": better, "words": hard}), source),
        with_scores(compared_run(tmp_path / "poor", pair(5.0, 4.0), strategy="b"),
                    scored({"cloze": hard, "words": hard}), source),
        with_scores(compared_run(tmp_path / "other", pair(6.0, 4.0), strategy="c"),
                    scored({"cloze": hard, "words": hard}, sha="others"), source),
        compared_run(tmp_path / "unscored", pair(6.5, 4.0), strategy="d"),
    ]  # fmt: skip


def test_models_are_set_against_the_best_run_item_by_item(three, tmp_path):
    tasks = write_comparison(three, tmp_path / "out")["tasks"]
    assert tasks["against"] == "good"  # the source is better, and no run
    models = {one["name"]: one for one in tasks["models"]}
    assert list(models) == ["big", "good", "poor", "other"]
    assert models["big"]["kind"] == "source"
    assert models["good"]["difference"] is None
    mine, best = (read_json(three[k] / "result.json")["items"] for k in (1, 0))
    each = [paired_scores(mine[name], best[name]) for name in ("cloze", "words")]
    found = models["poor"]["difference"]
    assert found["mean"] == pytest.approx(sum(one.difference for one in each) / 2)
    assert found["low"] < found["mean"] < found["high"] < 0  # ten of every hundred: told apart
    alone = models["poor"]["scores"]["cloze"]["stderr"]
    assert found["high"] - found["low"] < 2 * 1.96 * alone  # surer than two scores on their own
    assert models["other"]["difference"] is None  # its items are others


def test_the_page_and_the_markdown_show_them(three):
    comparison = compared(three)
    text = words(check_page(compare_page(comparison, "tasks")))
    assert "The difference is to good, item by item on the same items" in text
    assert "cloze, acc" in text
    markdown = to_markdown(comparison)
    line = next(line for line in markdown.splitlines() if line.startswith("| poor | 0."))
    assert line.count("(") == 1
    assert "| chance | 0.250 | 0.250 |" in markdown


def with_task(record, name, found):
    return record | {"tasks": record["tasks"] | {name: found}}


def test_single_tasks_of_a_group_do_not_vote(three):
    leaf = {"metric": "acc", "acc": 0.0, "acc_stderr": 0.1, "group": "words"}
    before = compared(three).tasks
    for run in three[:3]:
        path = run / "result.json"
        path.write_text(json.dumps(with_task(read_json(path), "one-of-sixty", leaf)))
    after = compared(three).tasks
    assert list(after.tasks) == list(before.tasks)
    assert [one.mean for one in after.models] == [one.mean for one in before.models]
    assert after.models[2].apart == before.models[2].apart is not None


def test_a_lower_perplexity_is_better_and_no_share(three):
    for run, perplexity in zip(three[:3], (40.0, 20.0, 30.0), strict=True):
        path = run / "result.json"
        record = {"metric": "word_perplexity", "word_perplexity": perplexity}
        record["higher_is_better"] = {"word_perplexity": False}
        result = with_task(read_json(path), "wiki", record)
        result["source"] = with_task(result["source"], "wiki", record | {"word_perplexity": 10.0})
        path.write_text(json.dumps(result))
    found = compared(three).tasks
    assert found.against == "good"
    assert all(one.mean is None or one.mean < 1 for one in found.models)
    assert found.models[2].apart.num_tasks == 2
    assert "wiki, word_perplexity \u2193" in words(check_page(compare_page(compared(three), "tasks")))
    assert "perplexity \u2193" in to_markdown(compared(three))


def test_scores_on_other_items_have_no_mean_and_cannot_win(three, tmp_path):
    best = scored({"cloze": "1" * N, "words": "1" * N}, sha="fewer")
    three.append(with_scores(compared_run(tmp_path / "few", pair(7.0, 4.0), strategy="e"), best))
    comparison = compared(three)
    found = {one.name: one for one in comparison.tasks.models}
    assert (found["few"].mean, found["few"].apart, comparison.tasks.against) == (None, None, "good")
    assert found["few"].scores["cloze"].value == 1
    assert "asked other items than most" in words(check_page(compare_page(comparison, "tasks")))
    assert "asked other items" not in words(check_page(compare_page(compared(three[:2]), "tasks")))


def test_a_run_and_a_model_of_the_same_name_keep_their_own_scores(tmp_path):
    run = compared_run(tmp_path / "runs" / "big", pair(4.0, 3.0), control=pair(6.0, 5.0))
    for place in ("model", "control/model"):
        (run / place).mkdir(parents=True)
    model = {"name": "big", "model": {"num_parameters": 9}, "domains": {}, "seq_len": 256, "data": "d1"}
    given = scored_models([run], [("org/big", model), ("other/big", model)])
    assert given == {
        "big": str(run / "model"),
        "big/control": str(run / "control" / "model"),
        "big (model)": "org/big",
        "big (model 2)": "other/big",
    }


def test_without_scores_there_is_no_section(tmp_path):
    comparison = compared([compared_run(tmp_path / "a", pair(4.0, 3.0))])
    assert comparison.tasks is None
    assert "Tasks" not in words(check_page(compare_page(comparison, "none")))


def test_what_was_measured_on_request_goes_before_the_result(three):
    given = {"good": scored({"cloze": outcomes(0.1, 9)}) | {"inference": {"decode_tokens_per_second": 50.0}}}
    comparison = compared(three, scores=given)
    good = next(one for one in comparison.tasks.models if one.name == "good")
    assert good.scores["cloze"].value == pytest.approx(outcomes(0.1, 9).count("1") / N)
    assert "What they cost to run" in words(check_page(compare_page(comparison, "speed")))


def test_a_task_that_is_measured_on_request_stands_beside_the_runs_own(three):
    comparison = compared(three, scores={"good": scored({"more": outcomes(0.1, 9)})})
    good = next(one for one in comparison.tasks.models if one.name == "good")
    assert set(good.scores) == {"cloze", "words", "more"}
    assert comparison.tasks.against == "good"


def test_a_model_that_lacks_a_task_is_not_said_to_have_other_items(three):
    for run in three[:2]:
        path = run / "result.json"
        result, more = read_json(path), scored({"more": outcomes(0.1, 9)})
        path.write_text(json.dumps(result | {key: result[key] | more[key] for key in more}))
    comparison = compared(three[:2])
    assert {one.name: (one.mean is None, one.is_alike) for one in comparison.tasks.models} == {
        "big": (True, True), "good": (False, True), "poor": (False, True),
    }  # fmt: skip
    text = words(check_page(compare_page(comparison, "tasks")))
    assert "Without a mean: it was not asked all of them." in text
    assert "other items" not in text


def test_time_has_a_picture_of_its_own_where_it_was_measured(three):
    given = {
        name: {"inference": {"decode_tokens_per_second": speed}} for name, speed in (("good", 50.0), ("poor", 90.0))
    }
    page = compare_page(compared(three, scores=given), "speed")
    assert "ms a written token" in page
    assert "ms a written token" not in compare_page(compared(three), "none")


def test_a_suite_stands_beside_what_its_paper_reports(three):
    names = [task.name for task in suites()["tinyllama"].tasks]
    suite = {"source": "paper", "note": "a note", "scores": dict.fromkeys(names, 0.5), "mean": 0.5}
    comparison = compared(three, scores={"good": {"suites": {"tinyllama": suite}}})
    text = words(check_page(compare_page(comparison, "suite")))
    assert "Suite tinyllama" in text
    assert "Pythia-1.0B" in text
    assert "this is no ranking" in text
    assert "Suite sheared" not in text
    cut = suite | {"unlike": ["the first 20 items of each task alone"]}
    text = words(check_page(compare_page(compared(three, scores={"good": {"suites": {"tinyllama": cut}}}), "suite")))
    assert "Not as published (the first 20 items of each task alone)" in text
    assert "Pythia-1.0B" not in text


def test_hostile_names_of_tasks_cannot_act(tmp_path):
    scores = scored({bad: outcomes(0.5, k) for k, bad in enumerate(HOSTILE)})
    runs = [with_scores(compared_run(tmp_path / name, pair(4.0, 3.0), strategy=name), scores) for name in "ab"]
    check_page(compare_page(compared(runs), "hostile"))
    assert "<script" not in to_markdown(compared(runs))


# ---- what papers report --------------------------------------------------------------------------

# The papers' own averages, as far as they state one: they say whether a row was copied rightly.
AVERAGES = {
    "sheared": {"LLaMA2-7B": 64.6, "OPT-1.3B": 48.2, "Pythia-1.4B": 48.9, "TinyLlama-1.1B": 50.0,
                "Sheared-LLaMA-1.3B": 51.0, "OPT-2.7B": 51.4, "Pythia-2.8B": 52.5, "INCITE-3B": 54.7,
                "OpenLLaMA-3B-v1": 55.1, "OpenLLaMA-3B-v2": 55.7, "Sheared-LLaMA-2.7B": 56.7},
    "tinyllama": {"Pythia-1.0B": 48.30, "TinyLlama-1.1B, 3T tokens": 52.99, "TinyLlama-1.1B-v1.1": 53.63},
    "inheritune-fineweb": {"GPT-2 medium, 24 layers": 47.74, "GPT-2 large, 32 layers": 49.44},
}  # fmt: skip


@pytest.mark.parametrize("name", published())
def test_a_table_has_the_tasks_of_its_suite_in_order(name):
    assert list(published()[name].rows[0].scores) == [task.task for task in suites()[name].tasks]


@pytest.mark.parametrize(("name", "model"), [(name, model) for name, rows in AVERAGES.items() for model in rows])
def test_rows_have_the_averages_that_the_papers_state(name, model):
    (row,) = [one for one in published()[name].rows if one.model == model]
    assert row.mean == pytest.approx(AVERAGES[name][model], abs=0.07)  # of scores with one digit
