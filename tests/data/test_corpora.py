"""CORPORA.yaml is checked strictly."""

import pytest
import yaml

from scionlm.core.errors import UsageError
from scionlm.data import load_corpora

GOOD = {"tokenizer": "t", "domains": {"prose": {"paths": ["*.txt"]}}}


def load(folder, config):
    path = folder / "corpora.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_corpora(path)


def test_the_defaults_are_the_documented_ones(tmp_path):
    corpora = load(tmp_path, GOOD)
    assert corpora.domains["prose"].text_key == "text"
    assert (corpora.held_out.fraction, corpora.held_out.min_documents) == (0.01, 20)
    assert corpora.separator is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokeniser": "t"}, r"unknown key 'tokeniser'; did you mean 'tokenizer'\?"),
        ({"held_out": {"fractoin": 0.1}}, r"unknown key 'held_out\.fractoin'; did you mean 'fraction'\?"),
        ({"domains": {}}, "domains"),
        ({"domains": {"prose": {"paths": []}}}, r"domains\.prose\.paths"),
        ({"domains": {"prose": {}}}, r"key 'domains\.prose\.paths' is required"),
        ({"domains": {"prose": {"path": ["x"]}}}, r"'domains\.prose\.path'; did you mean 'paths'\?"),
        ({"held_out": {"fraction": 0}}, r"held_out\.fraction"),
        ({"held_out": {"fraction": 1}}, r"held_out\.fraction"),
        ({"held_out": {"min_documents": 0}}, r"held_out\.min_documents"),
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_a_usage_error_that_names_it(tmp_path, changes, match):
    with pytest.raises(UsageError, match=match):
        load(tmp_path, GOOD | changes)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 65, "a\n"])
def test_a_domain_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="names a folder"):
        load(tmp_path, GOOD | {"domains": {name: {"paths": ["x"]}}})


@pytest.mark.parametrize("name", ["tokenizer", "index.json", "prepare.json"])
def test_a_domain_cannot_take_a_name_that_the_data_folder_uses_itself(tmp_path, name):
    with pytest.raises(UsageError, match=name):
        load(tmp_path, GOOD | {"domains": {name: {"paths": ["x"]}}})


def test_what_a_domain_says_of_one_problem_leaves_the_others_as_for_all(tmp_path):
    domains = {name: {"paths": [f"{name}.txt"]} for name in ("a", "b", "c")}
    for name, asked in (("b", {"empty": "stop"}), ("c", "stop")):
        domains[name] = domains[name] | {"on_error": asked}
    corpora = load(tmp_path, GOOD | {"domains": domains, "on_error": "skip"})
    assert set(corpora.actions("a").values()) == {"skip"}
    assert corpora.actions("b") == corpora.actions("a") | {"empty": "stop"}
    assert set(corpora.actions("c").values()) == {"stop"}
    partly = load(tmp_path, GOOD | {"on_error": {"json": "skip"}}).actions("prose")
    assert (partly["json"], partly["field"], partly["empty"]) == ("skip", "stop", "skip")
