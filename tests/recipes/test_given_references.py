"""References that a recipe takes from a file of `scion fit-reference`."""

import json
import math

import pytest

from features import MOVING
from scionlm.cli.fit_reference import fit_reference_command
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import write_json
from scionlm.recipes.config_data import ReweightConfig
from scionlm.recipes.references import given_references
from scionlm.recipes.run import run_recipe
from whole_runs import column, quicken, recipe_of

# LLaMA2 on two domains of RedPajama, and what LLM-Shearing (2310.06694) took from them as references.
SIZES = ("6738415616,1.7520,1.9219", "13015864320,1.6680,1.8486", "68976648192,1.4621,1.6848")
TARGETS = ["1.3B=1345423360", "2.7B=2701560320"]
PUBLISHED = {"1.3B": [1.9643, 2.1251], "2.7B": [1.8712, 2.0328]}


def fitted(folder, targets=TARGETS, domains=("cc", "c4")):
    """Return the file of references at the targets."""
    table, out = folder / "table.csv", folder / "r.json"
    table.write_text("\n".join([",".join(("parameters", *domains)), *SIZES]) + "\n")
    fit_reference_command(table, out, targets, "none", False)
    return out


def given(path, target=None, domains=("cc", "c4")):
    found = given_references(ReweightConfig(reference=str(path), target=target), list(domains))
    assert list(found) == list(domains)
    return [round(value, 4) for value in found.values()]


@pytest.mark.parametrize("target", PUBLISHED)
def test_a_recipe_reads_the_size_that_it_names(tmp_path, target):
    path = fitted(tmp_path)
    assert given(path, target) == PUBLISHED[target]
    assert given(path, target, ["c4"]) == PUBLISHED[target][1:]


def test_without_a_target_there_has_to_be_one_size_alone(tmp_path):
    assert given(fitted(tmp_path, TARGETS[1:])) == PUBLISHED["2.7B"]
    with pytest.raises(UsageError, match=r"reweight\.target None is not a size of .*\(has: 1\.3B, 2\.7B\)"):
        given(fitted(tmp_path))


def test_a_size_that_is_not_in_the_file_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean '1\.3B'\? \(has: 1\.3B, 2\.7B\)"):
        given(fitted(tmp_path), "1.3b")
    with pytest.raises(UsageError, match=r"'2\.7B' is not a size of .*\(has: 1\.3B\)"):
        given(fitted(tmp_path, TARGETS[:1]), "2.7B")


def test_a_domain_that_the_file_does_not_have_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no loss for domain 'wiki' \(has: cc, c4\)"):
        given(fitted(tmp_path), "1.3B", ["cc", "wiki"])


def test_a_reference_that_is_no_file_says_what_it_may_be(tmp_path):
    with pytest.raises(UsageError, match="give source, best, losses by domain, or a file"):
        given(tmp_path / "none.json", "1.3B")


@pytest.mark.parametrize("target", [None, "1.3B"])
@pytest.mark.parametrize(
    "document",
    [
        {},
        {"references": []},
        {"references": ["1.3B"]},
        {"references": {}},
        {"references": "1.3B"},
        {"references": {"1.3B": [1.9643]}},
        {"references": {"1.3B": {"cc": 1.9643}}},
        {"references": {"1.3B": {"cc": {"low": 1.9}}}},
        {"references": {"1.3B": {"cc": {"nll": "low"}}}},
    ],
    ids=json.dumps,
)
def test_another_document_is_not_taken_for_references(tmp_path, document, target):
    write_json(tmp_path / "r.json", document)
    with pytest.raises(DataError, match="is not a file of scion fit-reference"):
        given(tmp_path / "r.json", target, ["cc"])


def test_a_run_moves_its_weights_by_the_references_of_its_size(tmp_path, tiny_folder, data_folder, monkeypatch):
    quicken(monkeypatch.setattr)
    path = fitted(tmp_path, domains=("alpha", "beta"))
    moving = MOVING | {"reference": str(path), "step_size": 1.0}
    out = tmp_path / "run"
    recipe = recipe_of(tiny_folder, data_folder.path, train__steps=3, reweight=moving | {"target": "2.7B"})
    run_recipe(recipe, out)
    ((alpha,), (beta,)) = (column(out, f"reweight/{name}/reference_nats") for name in ("alpha", "beta"))
    assert [round(alpha, 4), round(beta, 4)] == PUBLISHED["2.7B"]
    excess = [column(out, f"reweight/{name}/nll_nats")[0] for name in ("alpha", "beta")]
    gains = [0.5 * math.exp(excess[0] - alpha), 0.5 * math.exp(excess[1] - beta)]
    assert column(out, "reweight/alpha/weight") == [pytest.approx(gains[0] / sum(gains))]
    with pytest.raises(UsageError, match=r"reweight\.target None"):
        run_recipe(recipe_of(tiny_folder, data_folder.path, reweight=moving), tmp_path / "unnamed")
    assert not (tmp_path / "unnamed").exists()
