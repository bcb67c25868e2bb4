"""`scion fit-reference`: what it writes, prints, warns of and refuses."""

import json

import pytest

from scionlm.cli.fit_reference import fit_reference_command
from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.core.records import read_json

CSV = "parameters,cc,c4\n6738415616,1.7520,1.9219\n13015864320,1.6680,1.8486\n68976648192,1.4621,1.6848\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(CSV)
    return path


def nll(document):
    return {
        name: [round(value["nll"], 4) for value in domains.values()] for name, domains in document["references"].items()
    }


def test_it_writes_a_versioned_document_and_prints_a_table(tmp_path, table, capsys):
    out = tmp_path / "new" / "references.json"
    fit_reference_command(table, out, ["1.3B=1345423360", "2.7B=2701560320"], "none", False)
    document = read_json(out)
    assert document["format_version"] == 1
    assert nll(document) == {"1.3B": [1.9643, 2.1251], "2.7B": [1.8712, 2.0328]}
    printed, said = capsys.readouterr()
    assert str(out) in printed.splitlines()[0]
    assert "1.9643 1." in printed
    assert "2.0328 2." in printed
    assert [path.name for path in out.parent.iterdir()] == ["references.json"]
    assert "warning: cc: degenerate: E is negative" in said
    assert said.count("exactly determined") == 1  # once for all domains
    assert "warning: all domains: exactly determined" in said


def test_the_bound_shows_in_the_document_and_in_what_is_said(tmp_path, table, capsys):
    fit_reference_command(table, tmp_path / "r.json", ["1.3B=1345423360"], "positive", False)
    document = read_json(tmp_path / "r.json")
    assert nll(document) == {"1.3B": [1.9881, 2.1251]}
    assert (document["bounds"], document["fits"]["cc"]["bound_active"]) == ("positive", True)
    printed, said = capsys.readouterr()
    assert "E >= 0" in printed
    assert "warning: cc: degenerate: E would be negative" in said
    assert "warning: c4: exactly determined" in said


def test_json_prints_exactly_the_document(tmp_path, table, capsys):
    fit_reference_command(table, tmp_path / "r.json", ["370M"], "positive", True)
    printed, said = capsys.readouterr()
    assert json.loads(printed) == read_json(tmp_path / "r.json")
    assert "extrapolation: 370M is 18 times smaller" in said


def test_flags_add_to_the_targets_of_the_table_and_replace_them(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text("losses: {cc: {7B: 1.75, 13B: 1.67, 70B: 1.46}}\ntargets: {1.3B: 1345423360, 3B: 3B}\n")
    fit_reference_command(path, tmp_path / "r.json", None, "positive", True)
    assert read_json(tmp_path / "r.json")["targets"] == {"1.3B": 1_345_423_360, "3B": 3_000_000_000}
    fit_reference_command(path, tmp_path / "r.json", ["1.3B", "half=500M"], "positive", True)
    targets = read_json(tmp_path / "r.json")["targets"]
    assert targets == {"1.3B": 1_300_000_000, "3B": 3_000_000_000, "half": 500_000_000}


def test_without_any_target_it_says_how_to_give_one(tmp_path, table):
    for parameters in (None, []):
        with pytest.raises(UsageError, match=r"--parameters 1\.3B .*'targets' in .*table\.csv"):
            fit_reference_command(table, tmp_path / "r.json", parameters, "positive", False)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("text", ["", "big", "=1B", "x=", "x=0", "a b=1B", "1.3B=x=y", "-1", "\udcff=1B"])
def test_a_size_that_is_none_is_a_wrong_request(tmp_path, table, text):
    with pytest.raises(UsageError, match="must be a size such as"):
        fit_reference_command(table, tmp_path / "r.json", [text], "positive", False)


def test_bounds_are_one_of_two(tmp_path, table):
    with pytest.raises(UsageError, match=r"bounds 'positiv' .*did you mean 'positive'\?"):
        fit_reference_command(table, tmp_path / "r.json", ["1B"], "positiv", False)


def test_nothing_that_was_there_is_lost(tmp_path, table):
    with pytest.raises(UsageError, match=r"must be a \.json file"):
        fit_reference_command(table, table, ["1B"], "positive", False)
    losses = tmp_path / "losses.json"
    losses.write_text(json.dumps({"losses": {"cc": {"7B": 1.75, "13B": 1.67, "70B": 1.46}}}))
    result = tmp_path / "result.json"
    result.write_text('{"format_version": 1, "training": {}}')
    before = losses.read_text(), result.read_text()
    for out in (losses, result):
        with pytest.raises(UsageError, match="holds no reference losses"):
            fit_reference_command(losses, out, ["1B"], "positive", False)
    assert before == (losses.read_text(), result.read_text())
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(StorageError, match="folder"):
        fit_reference_command(losses, tmp_path / "folder.json", ["1B"], "positive", False)


def test_a_broken_table_leaves_nothing_behind(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(CSV.replace("1.7520", "none"))
    with pytest.raises(DataError, match=r"table\.csv: losses\.cc\.6738415616"):
        fit_reference_command(path, tmp_path / "r.json", ["1B"], "positive", False)
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
