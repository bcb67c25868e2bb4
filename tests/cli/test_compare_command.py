"""`scion run`, `plan`, `report` and `compare` of a sweep: what a person and a program get."""

import json
import shutil

import pytest

from scionlm import api
from scionlm.cli import main as cli
from scionlm.core.config import dump_yaml
from whole_runs import SEQ_LEN, SEQUENCES, quicken


def scion(capsys, *arguments):
    """Run a command without a process of its own; return (exit code, stdout, stderr)."""
    code = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_folder, data_folder):
    """A recipe file of two runs, and the sweep made from it."""
    root = tmp_path_factory.mktemp("sweep")
    path = root / "layers.yaml"
    config = {
        "recipe": "sweep",
        "source": str(tiny_folder),
        "data": {"seq_len": SEQ_LEN},
        "inherit": {"layers": 3},
        "train": {"global_batch_tokens": SEQ_LEN * SEQUENCES, "precision": "fp32"},
        "evaluate": {"tokens_per_domain": 48},
        "runs": [{"name": "heir"}, {"name": "random", "inherit": {"init": "random"}}],
    }
    path.write_text(dump_yaml(config))
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        arguments = [f"data.dir={data_folder.path}", f"train.tokens={2 * SEQ_LEN * SEQUENCES}"]
        assert cli.run(["run", str(path), *arguments, "-o", str(root / "out")]) == 0
    return path, arguments, root / "out"


def test_a_sweep_prints_a_row_a_run_and_where_the_page_is(swept, capsys):
    path, arguments, out = swept
    code, shown, err = scion(capsys, "run", path, *arguments, "-o", out)
    assert (code, err.count("is finished already")) == (0, 2)
    assert "has the lowest held-out loss" in shown
    assert "heir" in shown
    assert "With one seed each no spread is known." in shown
    assert f"page: {out / 'compare.html'}" in shown
    code, _, err = scion(capsys, "run", path, *arguments, "optimizer.lr=0.01", "-o", out)
    assert code == 2
    assert "run heir: " in err
    assert "optimizer.lr" in err
    assert len(err.strip().splitlines()) == 1


def test_report_of_a_sweep_is_its_comparison(swept, capsys):
    out = swept[2]
    (out / "compare.html").unlink()
    assert scion(capsys, "report", out) == (0, f"{out / 'compare.html'}\n", "")
    assert "Scion comparison" in (out / "compare.html").read_text()


def test_a_plan_of_a_sweep_is_a_row_a_run_and_the_sum(swept, capsys):
    path, arguments, _ = swept
    code, shown, _ = scion(capsys, "plan", path, *arguments)
    assert code == 0
    assert "sweep of 2 runs" in shown
    assert "all" in shown
    document = json.loads(scion(capsys, "plan", path, *arguments, "--json")[1])
    assert document["format_version"] == 1
    assert document["num_tokens"] == 4 * SEQ_LEN * SEQUENCES
    assert [run["name"] for run in document["runs"]] == ["heir", "random"]


def test_runs_and_a_model_side_by_side_and_what_was_measured_is_kept(
    swept, capsys, tmp_path, tiny_folder, data_folder, monkeypatch
):
    arguments = [
        "compare", swept[2], swept[2] / "runs/heir/model", tiny_folder, "--data", data_folder.path, "-o", tmp_path / "c"
    ]  # fmt: skip
    code, shown, _ = scion(capsys, *arguments, "--json")
    assert code == 0
    record = json.loads(shown)
    assert record == json.loads((tmp_path / "c" / "compare.json").read_text())
    kinds = {row["name"]: row["kind"] for row in record["rows"]}
    assert sorted(kinds.values()) == ["model", "model", "run", "run"]
    means = {row["name"]: row["mean"] for row in record["rows"]}
    # Measured as the runs were, the exported model of a run has that run's loss, and the source that of the source.
    assert means[str(swept[2] / "runs/heir/model")] == pytest.approx(means["heir"], abs=1e-6)
    assert means[str(tiny_folder)] == pytest.approx(record["source"]["mean"], abs=1e-6)
    assert {row["not_comparable"] for row in record["rows"]} == {None}

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(api, "evaluate", never)
    code, shown, err = scion(capsys, *arguments)
    assert code == 0
    assert err.count("measured before") == 2
    assert f"page: {tmp_path / 'c' / 'compare.html'}" in shown
    with pytest.raises(AssertionError, match="measured again"):
        api.compare([str(tiny_folder)], tmp_path / "c", data=data_folder.path, max_tokens=20)
    other = shutil.copytree(tiny_folder, tmp_path / "other")  # the same weights, read in another way
    config = json.loads((other / "config.json").read_text()) | {"rope_theta": 7.0}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="measured again"):
        api.compare([str(other)], tmp_path / "c", data=data_folder.path, max_tokens=24)


def test_another_budget_makes_models_incomparable_and_says_so(swept, tmp_path, tiny_folder, data_folder):
    found = api.compare([swept[2], tiny_folder], tmp_path, data=data_folder.path, max_tokens=24, seq_len=12)
    row = next(row for row in found["rows"] if row["kind"] == "model")
    assert row["not_comparable"] == "losses of 24 tokens a domain, not of 48"
    assert row["mean"] is not None


def test_a_folder_that_holds_something_else_is_left_alone(swept, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = scion(capsys, "compare", swept[2], "-o", tmp_path)
    assert (code, "something else" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert scion(capsys, "compare", swept[2], "-o", tmp_path / "new")[0] == 0
    assert scion(capsys, "compare", swept[2], "-o", tmp_path / "new")[0] == 0


def test_scores_are_measured_on_request_and_kept(swept, tmp_path, tiny_folder, data_folder, capsys, monkeypatch):
    asked = ["--suite", "offline", "--limit", "6", "--speed", "--data", data_folder.path]
    command = ["compare", swept[2], tiny_folder, *asked, "-o", tmp_path / "out"]
    code, shown, _ = scion(capsys, *command)
    assert code == 0
    assert "scores, with their standard errors over items" in shown
    tasks = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"]
    found = {one["name"]: one for one in tasks["models"]}
    assert set(found) == {"heir", "random", str(tiny_folder)}
    for one in found.values():
        assert set(one["scores"]) == set(tasks["metrics"])
        assert one["inference"]["decode_tokens_per_second"] > 0
        assert (one["difference"] is None) == (one["name"] == tasks["against"])
    monkeypatch.setattr("scionlm.recipes.compared_scores.evaluate_model", None)  # not asked again
    assert scion(capsys, *command)[0] == 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"] == tasks


@pytest.mark.parametrize("flag", ["--limit 3", "--num-fewshot 0", "--allow-task-code"])
def test_what_is_said_of_tasks_needs_some(flag, capsys, tmp_path):
    code = cli.run(["compare", "a", "b", "-o", str(tmp_path / "out"), *flag.split()])
    assert code == 2
    assert f"{flag.split()[0]} is for tasks" in capsys.readouterr().err
