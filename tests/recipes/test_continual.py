"""Recipe continual: a model gone on with, what is measured of what it knew, and that nothing interrupts it."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from factories import corpora_file
from scionlm.core.config import validate
from scionlm.core.errors import UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.data.mixing.ledger import LEDGER, read_consumed
from scionlm.data.mixing.plan import REPLAYED
from scionlm.recipes import continual as continual_module
from scionlm.recipes import training as training_module
from scionlm.recipes.changes import judge_changes
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_train import AverageConfig
from scionlm.recipes.forgetting import forgetting
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.order import stage_folder
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe, settle_recipe, write_config
from scionlm.train.checkpoint import find_checkpoint
from whole_runs import (
    SETTINGS,
    Watch,
    column,
    consumed_of,
    differing,
    metrics_of,
    outcome,
    quicken,
    run_stopped,
    weights_of,
)

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
TRAIN = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")}
CONSTANT = {"name": "constant", "warmup": 0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


def recipe_with(name, data, changes):
    given_ = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(name, TRAIN | {"data.dir": str(data.path)} | given_)


@pytest.fixture
def going_on(earlier, data_folder):
    """Return a recipe that goes on with the result of `earlier` on one of its domains."""

    def going_on(**changes):
        first = {} if "branch" in changes else {"source": str(earlier / "model")}
        return recipe_with("continual", data_folder, first | {"data__mixture": {"beta": 1.0}} | changes)

    return going_on


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_folder) -> DataFolder:
    """Fewer documents under the same names of domains."""
    root = tmp_path_factory.mktemp("other")
    path = corpora_file(root, tiny_folder, num_documents=12, words=60)
    prepare(load_corpora(path), root, root / "data")
    return DataFolder(root / "data")


STAGES = [
    {"name": "a", "train": {"steps": 10}, "data": {"mixture": {"beta": 1.0}}},
    {"name": "b", "train": {"steps": 5}, "data": {"mixture": {"alpha": 1.0}}},
    {"name": "c", "train": {"steps": 2}, "data": {"mixture": {"beta": 1.0}}},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, earlier, data_folder, other):
    """A whole run of three stages, the last on what the first was on: folder, recipe and result."""
    changes = {
        "source": str(earlier / "model"), "stages": STAGES, "evaluate__every": 0, "checkpoint__every": 1,
        "upstream": {"dir": str(other.path), "domains": ["alpha"]},
    }  # fmt: skip
    recipe, out = recipe_with("continual", data_folder, changes), tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        return out, recipe, run_recipe(recipe, out)


# A whole run.


def losses(domains, names):
    return sum(domains[name]["nll"] for name in names) / len(names)


def test_forgetting_says_what_the_losses_say(finished):
    out, _, result = finished
    before, after, record = result["source"]["domains"], result["domains"], result["forgetting"]
    assert read_json(out / "result.json") == result | {"format_version": 1}
    assert result["upstream"] == ["alpha@upstream"]
    assert set(after) == {"alpha", "beta", "alpha@upstream"}
    old, new = record["upstream"], record["downstream"]
    assert (old["domains"], new["domains"]) == (["alpha@upstream"], ["beta", "alpha"])
    for part in (old, new):
        assert part["before"] == pytest.approx(losses(before, part["domains"]), abs=1e-12)
        assert part["after"] == pytest.approx(losses(after, part["domains"]), abs=1e-12)
        means = {
            line["step"]: sum(line[f"eval/{name}/nll_nats"] for name in part["domains"]) / len(part["domains"])
            for line in read_jsonl(out / "metrics.jsonl")
            if "eval/beta/nll_nats" in line
        }
        assert part["peak"]["nll"] == pytest.approx(max(means.values()), abs=1e-12)
        assert means[part["peak"]["step"]] == part["peak"]["nll"]
    assert old["forgetting"] == old["after"] - old["before"]
    assert new["adaptation"] == new["before"] - new["after"]
    assert record["net"] == new["adaptation"] - old["forgetting"]


def test_the_stages_are_in_the_record_with_what_they_were_the_first_to_train_on(finished):
    out, _, result = finished
    lines = {line["step"]: line for line in read_jsonl(out / "metrics.jsonl") if "eval/beta/nll_nats" in line}
    rows = result["forgetting"]["stages"]
    assert [(row["name"], row["domains"]) for row in rows] == [("a", ["beta"]), ("b", ["alpha"])]
    for row, last, domain in zip(rows, (10, 15), ("beta", "alpha"), strict=True):
        assert row["before"] == result["source"]["domains"][domain]["nll"]
        assert row["at_its_end"] == lines[last][f"eval/{domain}/nll_nats"]
        assert row["after"] == result["domains"][domain]["nll"]
        assert row["forgetting"] == row["after"] - row["at_its_end"] != 0


def test_what_was_known_before_is_evaluated_and_never_trained_on(finished, data_folder, other):
    out, recipe, _ = finished
    for line in read_jsonl(out / "metrics.jsonl"):
        evaluated = {key.split("/")[1] for key in line if key.startswith("eval/")}
        assert evaluated in (set(), {"alpha", "beta", "alpha@upstream"})
    consumed = consumed_of(out, recipe)
    assert [{name for name, _ in consumed[stage]} for stage in "abc"] == [{"beta"}, {"alpha"}, {"beta"}]
    for stage in "abc":
        assert read_consumed(stage_folder(out, stage)).data.fingerprint == data_folder.fingerprint != other.fingerprint


def test_the_card_names_what_it_was_trained_on_and_apart_what_it_was_measured_on(going_on, earlier, tmp_path):
    run_recipe(going_on(upstream={"domains": ["alpha"]}, train__steps=1), tmp_path / "apart")
    card = (tmp_path / "apart/model/README.md").read_text()
    assert re.search(r"beta \([\d.,k]+ tokens to train on\); measured on alone: alpha", card)
    run_recipe(going_on(replay={"run": str(earlier), "fraction": 0.5}, train__steps=2), tmp_path / "replayed")
    assert "measured on alone" not in (tmp_path / "replayed/model/README.md").read_text()


def test_losses_are_measured_densely_where_a_stage_begins_and_not_elsewhere(finished, going_on, tmp_path):
    def evaluated(out):
        return [line["step"] for line in metrics_of(out) if "eval/beta/nll_nats" in line]

    assert evaluated(finished[0]) == [0, 1, 2, 4, 8, 10, 11, 12, 14, 15, 16, 17]
    run_recipe(going_on(train__steps=9, evaluate__every=4), tmp_path / "both")
    assert evaluated(tmp_path / "both") == [0, 1, 2, 4, 8, 9], "from `every` on it is enough"
    run_recipe(going_on(train__steps=5, evaluate__every=0, evaluate__dense=False), tmp_path / "not")
    assert evaluated(tmp_path / "not") == [0, 5]


def test_the_loss_of_upstream_is_that_of_its_own_folder(finished, going_on, other, tmp_path):
    """And not that of the domain of the same name."""
    _, _, result = finished
    there = going_on(data__dir=str(other.path), data__mixture={"alpha": 1.0}, train__steps=1)
    alone = run_recipe(there, tmp_path / "there")["source"]["domains"]
    assert result["source"]["domains"]["alpha@upstream"]["nll"] == alone["alpha"]["nll"]
    assert result["source"]["domains"]["alpha"]["nll"] != alone["alpha"]["nll"]
    assert read_json(tmp_path / "there" / "result.json")["forgetting"] is None, "nothing says what it knew"


# What the model knew before.


@pytest.mark.parametrize(
    ("changes", "upstream"),
    [
        ({"upstream": {}}, {"alpha": ("data", "alpha")}),
        ({"upstream": {"domains": ["beta"]}}, {"beta": ("data", "beta")}),
        ({"upstream": {"dir": "OTHER"}}, {"alpha": ("other", "alpha"), "beta@upstream": ("other", "beta")}),
        ({"upstream": {"dir": "OTHER", "domains": ["beta"]}}, {"beta@upstream": ("other", "beta")}),
        ({"upstream": {"dir": "DATA"}}, {"alpha": ("data", "alpha"), "beta": ("data", "beta")}),
        ({"replay": {"run": "EARLIER"}}, {"alpha": ("data", "alpha"), "beta": ("data", "beta")}),
        ({"replay": {"data": "OTHER"}}, {"alpha": ("other", "alpha"), "beta@upstream": ("other", "beta")}),
        ({"replay": {"data": "OTHER", "domains": ["alpha"]}}, {"alpha": ("other", "alpha")}),
        ({"replay": {"domains": ["alpha"]}}, {"alpha": ("data", "alpha")}),
        ({"replay": {"run": "EARLIER"}, "upstream": {"domains": ["alpha"]}}, {"alpha": ("data", "alpha")}),
        ({"stages": [{"name": "a"}, {"name": "b", "replay": {"stage": "a"}}]}, {}),
        ({}, {}),
    ],
)
def test_upstream_is_what_is_named_or_what_is_replayed(
    going_on, data_folder, other, earlier, tmp_path, changes, upstream
):
    words = {"OTHER": str(other.path), "DATA": str(data_folder.path), "EARLIER": str(earlier)}
    filled = {
        key: {k: words.get(v, v) if isinstance(v, str) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in changes.items()
    }
    inputs = open_inputs(going_on(**filled), tmp_path / "run")
    places = {"data": data_folder.fingerprint, "other": other.fingerprint}
    found = {name: (inputs.held_out[name][0].fingerprint, inputs.held_out[name][1]) for name in inputs.upstream}
    assert found == {name: (places[place], domain) for name, (place, domain) in upstream.items()}
    assert list(inputs.upstream) == list(upstream)
    assert inputs.held_out["beta"][0].fingerprint == data_folder.fingerprint, "what is trained on keeps its name"


def test_a_share_of_nothing_is_the_baseline_of_those_that_replay(going_on, earlier, tmp_path):
    """It replays nothing, and forgets what it would have replayed."""
    replay = {"run": str(earlier), "fraction": 0}
    inputs = open_inputs(going_on(replay=replay), tmp_path / "run")
    assert inputs.stages[0].sampling.replay is None
    assert inputs.stages[0].sampling.plan().replay is None
    assert inputs.upstream == ("alpha", "beta")
    run_recipe(going_on(replay=replay, train__steps=2), tmp_path / "nothing")
    run_recipe(going_on(train__steps=2, upstream={"domains": ["alpha"]}), tmp_path / "without")
    assert weights_of(tmp_path / "nothing") == weights_of(tmp_path / "without")
    assert all(not name.startswith(REPLAYED) for name in read_jsonl(tmp_path / "nothing" / LEDGER)[-1]["counts"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"upstream": {"domains": ["alhpa"]}},
            r"upstream\.domains: 'alhpa' is not in .*; did you mean 'alpha'\? \(has",
        ),
        ({"upstream": {"dir": "nowhere"}}, "nowhere"),
        ({"upstream": {}, "data__mixture": {"alpha": 1, "beta": 1}}, "upstream: every domain of .* is trained on"),
        (
            {"replay": {"domains": ["alpha"]}, "data__mixture": None},
            r"replay\.domains: alpha would be trained on as new text too.*set data\.mixture=\{beta: 1\}",
        ),
        ({"replay": {"domains": ["alhpa"]}}, r"replay\.domains: 'alhpa' is not in .*; did you mean 'alpha'"),
    ],
)
def test_an_upstream_that_is_not_there_is_refused_by_name(going_on, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        run_recipe(going_on(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_upstream_is_another_run():
    with pytest.raises(UsageError, match="another upstream: its fingerprint has changed"):
        judge_changes({"upstream": {"fingerprint": "1"}}, {"upstream": {"fingerprint": "2"}}, "RUN", True)


# Stopped, killed, and gone on with.


class Killed(BaseException):
    """The process is gone: nothing is saved any more."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, earlier, data_folder):
    """A run of two stages with replay and an average, never stopped."""
    stages = [{"name": "a", "train": {"steps": 3}}, {"name": "b", "train": {"steps": 4}, "optimizer_state": "reset"}]
    changes = {
        "source": str(earlier / "model"), "stages": stages, "data__mixture": {"beta": 1.0},
        "replay": {"run": str(earlier), "fraction": 0.3}, "average": {"method": "start", "share": 0.3},
    }  # fmt: skip
    recipe, out = recipe_with("continual", data_folder, changes), tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        run_recipe(recipe, out)
    return recipe, outcome(out, recipe)


def test_stopped_and_gone_on_with_is_never_stopped(uninterrupted, tmp_path, monkeypatch):
    recipe, whole = uninterrupted
    with monkeypatch.context() as patch:
        assert run_stopped(recipe, tmp_path / "run", Watch(patch, [2, 3, 6])) == 3
    assert differing(whole, outcome(tmp_path / "run", recipe)) == set()


@pytest.mark.parametrize("where", ["between two stages", "before it is said what was forgotten"])
def test_killed_and_gone_on_with_is_never_killed(uninterrupted, tmp_path, monkeypatch, where):
    recipe, whole = uninterrupted
    place, name, sound = {
        "between two stages": (training_module, "_open_stage", 1),
        "before it is said what was forgotten": (continual_module, "forgetting", 0),
    }[where]
    calls, original = itertools.count(), getattr(place, name)

    def dying(*arguments):
        if next(calls) >= sound:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path / "run")
    run_recipe(recipe, tmp_path / "run")
    assert differing(whole, outcome(tmp_path / "run", recipe)) == set()


# Going on with the optimizer's state.


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, data_folder):
    """A model from scratch, trained at a constant rate for four steps, and for eight; where they are."""
    root = tmp_path_factory.mktemp("trunk")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        for name, steps in (("half", 4), ("whole", 8)):
            changes = {"model": MODEL, "train__steps": steps, "schedule": CONSTANT, "checkpoint__every": 2}
            run_recipe(recipe_with("scratch", data_folder, changes), root / name)
    return root


def onwards(data_folder, trunk, **changes):
    base = {"branch": {"run": str(trunk / "half")}, "schedule": CONSTANT, "train__steps": 4}
    return recipe_with("continual", data_folder, base | changes)


def test_going_on_at_the_same_rate_with_the_state_is_no_interruption(data_folder, trunk, tmp_path):
    for state in ("keep", "reset"):
        run_recipe(onwards(data_folder, trunk, optimizer_state=state), tmp_path / state)
    assert weights_of(tmp_path / "keep") == weights_of(trunk / "whole")
    assert column(tmp_path / "keep", "train/nll_nats") == column(trunk / "whole", "train/nll_nats")[4:]
    assert weights_of(tmp_path / "reset") != weights_of(trunk / "whole"), "negative control: the state makes it so"


@pytest.mark.parametrize("state", ["reset", "keep"])
def test_without_a_state_the_first_step_moves_each_weight_by_the_rate(data_folder, trunk, tmp_path, state):
    run_recipe(
        onwards(data_folder, trunk, train__steps=1, optimizer_state=state, optimizer__weight_decay=0.0),
        tmp_path / "run",
    )
    old, new = (load_file(out / "model" / "model.safetensors") for out in (trunk / "half", tmp_path / "run"))
    moved = torch.cat([(new[name] - old[name]).abs().flatten() for name in old]) / 3e-3
    by_the_rate = ((moved - 1).abs() < 0.01).float().mean().item()
    assert by_the_rate > 0.99 if state == "reset" else by_the_rate < 0.1


def test_the_source_is_the_branchs_model(data_folder, trunk):
    assert onwards(data_folder, trunk).source == str(trunk / "half" / "model")
    folder = trunk / "half" / "checkpoints" / "step-00000002"
    assert onwards(data_folder, trunk, branch={"run": str(folder)}).source == str(trunk / "half" / "model")
    assert onwards(data_folder, trunk, source="mine").source == "mine"


def test_a_branch_off_the_middle_forgets_what_it_knew_there(data_folder, trunk, tmp_path):
    folder = trunk / "half" / "checkpoints" / "step-00000002"
    common = {"data__mixture": {"beta": 1.0}, "upstream": {}, "train__steps": 1, "evaluate__every": 0}
    by_step = onwards(data_folder, trunk, branch={"run": str(trunk / "half"), "step": 2}, **common)
    result = run_recipe(by_step, tmp_path / "step")
    record = result["forgetting"]["upstream"]
    assert record["before"] == result["before"]["alpha"]["nll"] != result["source"]["domains"]["alpha"]["nll"]
    run_recipe(onwards(data_folder, trunk, branch={"run": str(folder)}, **common), tmp_path / "folder")
    assert weights_of(tmp_path / "step") == weights_of(tmp_path / "folder")


# Replay.


def test_new_and_old_tokens_are_the_budget_and_the_share_holds_at_every_moment(
    going_on, earlier, tmp_path, monkeypatch
):
    watch, share, steps = Watch(monkeypatch), 0.23, 20
    replay = {"run": str(earlier), "fraction": share}
    out = tmp_path / "run"
    result = run_recipe(
        going_on(replay=replay, train__steps=steps, checkpoint__every=1, evaluate__every=0, evaluate__dense=False), out
    )
    budget = steps * TRAIN["train.global_batch_tokens"]
    assert result["training"]["tokens"] == budget
    lines = [line for line in read_jsonl(out / LEDGER) if "slots" in line]
    assert [line["slots"] for line in lines] == [4 * step for step in range(1, steps + 1)]
    for line in lines:
        assert sum(line["counts"].values()) == line["slots"], "what is replayed is taken from the new"
        assert abs(line["counts"][REPLAYED] - share * line["slots"]) <= 1
    assert sum(lines[-1]["counts"].values()) * TRAIN["data.seq_len"] == budget
    samples = [sample for step in watch.samples for sample in step]
    for number in range(1, len(samples) + 1):
        old = sum(sample.domain.startswith(REPLAYED) for sample in samples[:number])
        assert abs(old - share * number) <= 1
    replayed = [(s.domain.removeprefix(REPLAYED), s.draw) for s in samples if s.domain.startswith(REPLAYED)]
    in_order = read_consumed(earlier).samples()
    assert replayed == [tuple(next(in_order)) for _ in replayed], "in the order in which they were learned"


# The average with the first weights.


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("stop_at", [[], [2]])
def test_the_average_with_the_first_weights_is_of_the_last_and_the_first(
    going_on, earlier, tmp_path, monkeypatch, branches, stop_at
):
    changes = {"branch": {"run": str(earlier), "step": 3}} if branches else {}
    recipe, out = going_on(average={"method": "start", "share": 0.3}, train__steps=3, **changes), tmp_path / "run"
    assert run_stopped(recipe, out, Watch(monkeypatch, stop_at)) == len(stop_at)
    first = load_file(earlier / "model" / "model.safetensors")
    if branches:  # which is not where the run that it branches off has ended
        first = find_checkpoint(earlier, 3).tensors("weights")
    last, found = find_checkpoint(out).tensors("weights"), load_file(out / "model" / "model.safetensors")
    assert found.keys() == first.keys() == last.keys()
    for name, tensor in found.items():
        assert not torch.equal(first[name], last[name])
        torch.testing.assert_close(tensor, 0.3 * first[name] + 0.7 * last[name], rtol=1e-6, atol=1e-7)
    result = read_json(out / "result.json")
    assert result["training"]["unaveraged"]["beta"]["nll"] != result["domains"]["beta"]["nll"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"method": "ema", "share": 0.3}, "share"),
        ({"share": 0.3}, "share"),
        ({"method": "uniform", "share": 0.3}, "share"),
        ({"method": "uniform", "decay": 0.9}, "decay"),
        ({"method": "start", "decay": 0.9}, "decay"),
        ({"method": "start", "start": 3}, "start"),
        ({"method": "start", "every": 2}, "every"),
    ],
)
def test_keys_that_say_nothing_to_an_average_are_refused(config, key):
    with pytest.raises(UsageError, match=rf"average: {key} says nothing to average\.method"):
        validate(AverageConfig, config, "average")
    right = {"ema": {"decay": 0.9, "start": 3, "every": 2}, "uniform": {"start": 3}, "start": {"share": 0.3}}
    for method, keys in right.items():
        assert validate(AverageConfig, {"method": method} | keys, "average").method == method


@pytest.mark.parametrize("before", [None, {"method": "ema", "decay": 0.9}])
def test_a_run_that_kept_no_first_weights_cannot_go_on_to_an_average_with_them(going_on, tmp_path, before):
    start = {"method": "start", "share": 0.3}
    write_config(going_on(average=before), tmp_path)
    with pytest.raises(UsageError, match=r"average\.method cannot change"):
        settle_recipe(going_on(average=start), tmp_path, allow_change=True)
    write_config(going_on(average=start), tmp_path)
    less = settle_recipe(going_on(average=start | {"share": 0.1}), tmp_path, allow_change=True)
    assert less.average is not None
    assert less.average.share == 0.1


# The control.


def test_the_control_is_a_random_model_of_the_same_shape_on_the_same_batches(going_on, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    average = {"method": "start", "share": 0.5}
    result = run_recipe(going_on(control=True, train__steps=3, upstream={}, average=average), tmp_path / "run")
    rows, control = watch.rows(), tmp_path / "run" / "control"
    assert rows[:3] == rows[3:]
    assert rows[0] != rows[1]
    shapes = [
        {name: tensor.shape for name, tensor in load_file(out / "model" / "model.safetensors").items()}
        for out in (tmp_path / "run", control)
    ]
    assert shapes[0] == shapes[1]
    assert result["control"]["domains"] == read_json(control / "result.json")["domains"]
    assert result["control"]["before"]["alpha"]["nll"] > result["before"]["alpha"]["nll"] + 0.1, "it knows nothing"
    last = find_checkpoint(control).tensors("weights")
    found = load_file(control / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in last.items()), "with no weights to go back to"
    assert read_json(tmp_path / "run" / "result.json")["forgetting"] == result["forgetting"] is not None


# What is refused.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inherit": {"layers": 2}}, "recipe continual goes on with its source as it is; leave inherit out"),
        ({"model": MODEL}, "leave model out"),
        ({"grow": {}}, "leave grow out"),
        ({"reference": {"model": MODEL}, "inherit": {"layers": 2}}, "leave reference, inherit out"),
        ({"target": {"num_hidden_layers": 1}}, "target is for recipe shear, not continual"),
        ({"source": None}, r"recipe continual needs source \(a MODEL\), or branch \(a run to go on from\)"),
        ({"fidelity": "paper"}, "fidelity of recipe continual is one of"),
        ({"control": True, "branch": {"run": "somewhere"}}, "a control would have nothing to go on from"),
    ],
)
def test_what_recipe_continual_has_no_use_for_is_refused(changes, words):
    config = {"recipe": "continual", "source": "s", "data": {"dir": "d"}, "train": {"steps": 8}}
    assert validate(Recipe, config, "given").source == "s"
    with pytest.raises(UsageError, match=words):
        validate(Recipe, config | changes, "given")


def test_a_bare_recipe_says_what_it_needs():
    with pytest.raises(UsageError, match=r"recipe continual needs source, data\.dir, train\.tokens"):
        load_recipe("continual", ["optimizer.lr=1e-3"])


# Forgetting, by hand.


def evaluation(step, **nlls):
    return {"step": step, "tokens": 10 * step} | {f"eval/{name}/nll_nats": nll for name, nll in nlls.items()}


BEFORE, AFTER = {"old": 1.0, "older": 3.0, "new": 5.0}, {"old": 1.5, "older": 4.0, "new": 2.0}
WAY = [
    evaluation(0, old=1.0, older=3.0, new=5.0), evaluation(2, old=2.5, older=4.5, new=3.0),
    evaluation(4, old=2.0, older=4.5, new=2.5), evaluation(8, old=1.5, older=4.0, new=2.0),
]  # fmt: skip


def test_forgetting_and_adaptation_of_numbers_made_by_hand():
    record = forgetting(BEFORE, AFTER, WAY, ["old", "older"], [("main", 8, ["new"])])
    assert record == {
        "upstream": {
            "domains": ["old", "older"], "before": 2.0, "after": 2.75, "forgetting": 0.75,
            "peak": {"nll": 3.5, "step": 2, "tokens": 20},
        },
        "downstream": {
            "domains": ["new"], "before": 5.0, "after": 2.0, "adaptation": 3.0,
            "peak": {"nll": 5.0, "step": 0, "tokens": 0},
        },
        "net": 2.25,
    }  # fmt: skip


def test_what_is_not_known_is_not_said():
    assert forgetting(BEFORE, AFTER, WAY, [], [("main", 8, ["new"])]) is None
    all_old = forgetting(BEFORE, AFTER, [], list(BEFORE), [("main", 8, [])])
    assert all_old is not None
    assert (all_old["downstream"], all_old["net"], all_old["upstream"]["peak"]) == (None, None, None)
    unmeasured = forgetting(BEFORE, AFTER, [evaluation(2, new=9.0), {"step": 3}], ["old"], [("main", 8, ["new"])])
    assert unmeasured is not None
    assert unmeasured["upstream"]["peak"] is None, "no line has the loss"


def test_stages_of_numbers_made_by_hand():
    stages = [("first", 2, ["new"]), ("second", 4, ["old"]), ("third", 8, []), ("fourth", 9, ["older"])]
    record = forgetting(BEFORE, AFTER, WAY, [], stages)
    assert record is not None
    assert (record["upstream"], record["net"]) == (None, None)
    first, second, fourth = record["stages"]
    assert first == {
        "name": "first", "domains": ["new"], "before": 5.0, "at_its_end": 3.0, "after": 2.0, "forgetting": -1.0,
    }  # fmt: skip
    assert (second["at_its_end"], second["after"], second["forgetting"]) == (2.0, 1.5, -0.5)
    assert (fourth["at_its_end"], fourth["forgetting"]) == (4.0, 0.0), "the last ends where the run does"


NLLS = st.floats(0.0, 12.0).map(lambda nll: round(nll, 3))
LEVELS = ("before", "after", "at_its_end", "nll")


def moved(value, by, key=""):
    """Return a record with the levels in it moved."""
    if isinstance(value, dict):
        return {name: moved(inner, by, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, by) for inner in value]
    return value + by if key in LEVELS else value


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return pytest.approx(value, abs=1e-9) if isinstance(value, float) else value


@settings(max_examples=100)
@given(
    st.lists(st.tuples(NLLS, NLLS, NLLS), min_size=2, max_size=6), st.integers(0, 3), st.sampled_from([-7.5, 0.25, 3.0])
)
def test_losses_that_are_all_higher_by_the_same_change_levels_alone(rows, known, by):
    names = ["old", "older", "new"]
    stages = [("first", 1, names[known:][:1]), ("second", len(rows), names[known:][1:])]

    def record(by):
        lines = [
            evaluation(step, **{n: x + by for n, x in zip(names, row, strict=True)}) for step, row in enumerate(rows)
        ]
        before, after = ({n: x + by for n, x in zip(names, row, strict=True)} for row in (rows[0], rows[-1]))
        return forgetting(before, after, lines, names[:known], stages)

    plain, higher = record(0.0), record(by)
    # Where two lines are the highest, rounding may choose either.
    for one in (plain, higher):
        for key in ("upstream", "downstream"):
            if one[key]:
                assert one[key].pop("peak")["nll"] >= max(one[key]["before"], one[key]["after"]) - 1e-9
    assert higher == rounded(moved(plain, by))
    if plain["net"] is not None:
        assert plain["net"] == plain["downstream"]["adaptation"] - plain["upstream"]["forgetting"]
