"""Rounds of growth: what each child begins with, what it sees, when it ends, and that no stop changes anything."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from scionlm.core.errors import StoppedError, UsageError
from scionlm.core.records import read_json
from scionlm.data.mixing.plan import REPLAYED
from scionlm.evaluation.paired import Difference
from scionlm.recipes import child as child_module
from scionlm.recipes import growth as growth_module
from scionlm.recipes.run import run_recipe
from scionlm.surgery.depth import plan_growth
from scionlm.train.checkpoint import find_checkpoint
from scionlm.train.optimizer import Optimizer
from whole_runs import Watch, metrics_of, quicken, recipe_of, run_stopped, timeless, weights_of

STUDENT = {"from": "student", "by": 1, "max_layers": 3, "until": "end"}
SOURCE = STUDENT | {"from": "source"}
INITS = ["source_next", "stack", "random", "zero_output"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def grown(tiny_folder, data_folder):
    """Return a recipe that grows."""

    def grown(grow, **changes):
        return recipe_of(
            tiny_folder, data_folder.path, **{"grow": grow, "train__steps": 3, "evaluate__every": 1} | changes
        )

    return grown


@pytest.fixture
def begun(monkeypatch):
    """Keep the weights that every model begins with, and the optimizer's state, by the name of its folder."""
    kept = {}

    def watching(setting, make_model, out, name, begin=None):
        def made(its_setting):
            model = make_model(its_setting)
            kept[out.name] = {key: value.clone() for key, value in model.state_dict().items()}
            return model

        def begins(learner, position):
            if begin is not None:
                begin(learner, position)
            kept[f"{out.name} optimizer"] = {k: v.clone() for k, v in learner.optimizer.tensors().items()}
            kept[f"{out.name} cursors"] = dict(position.cursors)

        return train_model(setting, made, out, name, begins)

    train_model = child_module.train_model
    monkeypatch.setattr(child_module, "train_model", watching)
    return kept


def script(monkeypatch, *values):
    """Let the comparisons of the rounds show these differences."""
    shown = iter(values)

    def compared(mine, theirs, confidence):
        value = next(shown)
        return Difference(value, value - 0.01, value + 0.01, confidence, 9, dict.fromkeys(mine, value))

    monkeypatch.setattr(growth_module, "paired_difference", compared)


def layer(state, index):
    """Return the tensors of a layer."""
    return {k.split(".", 3)[3]: v for k, v in state.items() if k.startswith(f"model.layers.{index}.")}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key].float(), theirs[key].float()) for key in mine)


def outside(state):
    return {key: value for key, value in state.items() if not key.startswith("model.layers.")}


def test_a_round_from_the_source_is_a_run_of_its_own(grown, tiny_folder, data_folder, tmp_path):
    """Whatever rounds came before: the same weights, samples and schedule, and an optimizer without a past (G1, G5)."""
    run_recipe(grown(SOURCE), tmp_path / "grown")
    plain = {"train__steps": 3, "evaluate__every": 1}
    for number, layers in enumerate((2, 3), 1):
        alone = tmp_path / f"alone-{layers}"
        run_recipe(recipe_of(tiny_folder, data_folder.path, inherit__layers=layers, **plain), alone)
        here = tmp_path / "grown" / "rounds" / f"round-{number:02d}"
        assert weights_of(here) == weights_of(alone)
        assert metrics_of(here) == metrics_of(alone)
    assert weights_of(tmp_path / "grown") == weights_of(here)


@pytest.mark.parametrize("init", INITS)
def test_what_a_student_grows_into(init, grown, begun, tiny_folder, tmp_path):
    """What was trained is as it was trained, in float32; the rest is the source's, a copy, or fresh (G2)."""
    recipe = grown(STUDENT | {"init": init}, export__dtype="bfloat16")
    run_recipe(recipe, tmp_path / "run")
    trained = find_checkpoint(tmp_path / "run/rounds/round-01").tensors("weights")
    assert not same(trained, {k: begun["round-01"][k] for k in trained})
    new = begun["round-02"]
    assert same(outside(trained), {key: value for key, value in outside(new).items() if key in trained})
    plan = plan_growth(["student", "source"], 2, 3, init, num_donor_layers=5).layers
    added = 2  # one that is added to two stands behind both, in every way
    assert [(one.index, one.init) for one in plan[:added]] == [(0, "source"), (1, "source")]
    for place in (0, 1):
        assert same(layer(new, place), layer(trained, place))
    if init == "zero_output":
        ends = [value for name, value in layer(new, added).items() if "o_proj" in name or "down_proj" in name]
        assert [float(end.abs().max()) for end in ends] == [0.0, 0.0]
    source = load_file(tiny_folder / "model.safetensors")
    alike = {
        "source_next": same(layer(new, added), layer(source, 2)),
        "stack": same(layer(new, added), layer(trained, 0)),
    }
    assert alike.get(init, not any(same(layer(new, added), layer(trained, i)) for i in (0, 1)))
    entry = read_json(tmp_path / "run/rounds.json")["rounds"][1]["origins"]
    assert [one.get("student_layer") for one in entry if one.get("student_layer") is not None][:2] == [0, 1]
    assert not (tmp_path / "run/rounds/round-02/student").exists()


def test_a_layer_that_passes_its_input_on_changes_nothing(grown, tmp_path):
    run_recipe(grown(STUDENT | {"init": "zero_output"}, export__dtype="float32"), tmp_path / "run")
    first, second = (read_json(tmp_path / f"run/rounds/round-0{n}/result.json") for n in (1, 2))
    for domain, loss in first["domains"].items():
        assert second["before"][domain]["nll"] == pytest.approx(loss["nll"], abs=1e-5)
    assert second["domains"] != first["domains"]


@pytest.mark.parametrize("init", INITS)
def test_growth_from_the_source_in_every_way(init, grown, begun, tiny_folder, tmp_path):
    run_recipe(grown(SOURCE | {"init": init}), tmp_path / "run")
    source, new = load_file(tiny_folder / "model.safetensors"), begun["round-02"]
    own = [n for n in range(3) if any(same(layer(new, n), layer(source, k)) for k in range(3))]
    assert len(own) == {"source_next": 3, "stack": 3}.get(init, 2)
    if init == "stack":
        assert same(layer(new, 2), layer(source, 0))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_that_were_trained_may_keep_the_optimizers_state(name, grown, begun, tmp_path):
    recipe = grown(STUDENT | {"optimizer_state": "keep"}, optimizer__name=name)
    run_recipe(recipe, tmp_path / "run")
    before = find_checkpoint(tmp_path / "run/rounds/round-01").tensors("optimizer")
    kept = begun["round-02 optimizer"]
    assert kept.keys() == before.keys()  # the third layer has none
    assert all(torch.equal(kept[key].cpu(), before[key]) for key in kept)
    run_recipe(grown(STUDENT, optimizer__name=name), tmp_path / "reset")
    assert begun["round-02 optimizer"] == {}
    assert weights_of(tmp_path / "run") != weights_of(tmp_path / "reset")


def test_copies_of_a_layer_have_no_past(grown, begun, tmp_path):
    run_recipe(grown(STUDENT | {"init": "stack", "optimizer_state": "keep"}), tmp_path / "run")
    assert not any(key.startswith("model.layers.2.") for key in begun["round-02 optimizer"])
    assert any(key.startswith("model.layers.1.") for key in begun["round-02 optimizer"])


@pytest.mark.parametrize(("base", "again"), [("source", True), ("student", False)])
def test_which_samples_a_round_sees(base, again, grown, tmp_path, monkeypatch):
    """Weights that went on go on in the data; weights that begin anew see what the first round's saw."""
    watch = Watch(monkeypatch)
    run_recipe(grown(STUDENT | {"from": base}), tmp_path / "run")
    steps = [tuple(map(tuple, step)) for step in watch.samples]
    assert len(steps) == 6
    assert (steps[:3] == steps[3:]) is again
    if not again:
        assert len({sample for step in steps for sample in step}) == sum(map(len, steps))


def test_it_grows_until_it_matches(grown, tmp_path, monkeypatch):
    script(monkeypatch, 0.06, 0.03, 0.0, -1.0)
    result = run_recipe(grown({"by": 1}), tmp_path / "run")
    ledger = read_json(tmp_path / "run/rounds.json")
    assert [one["layers"] for one in ledger["rounds"]] == [2, 3, 4]
    assert (ledger["outcome"], ledger["result_round"]) == ("matched", 3)
    assert result["model"]["num_hidden_layers"] == 4
    assert result["rounds"] == 3
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "run/rounds/round-03")
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "train/nll_nats" in line]
    assert steps == list(range(1, 10))


def test_the_ledger_adds_up(grown, tmp_path, monkeypatch):
    script(monkeypatch, 0.5, 0.4)
    run_recipe(grown({"by": 1, "max_rounds": 2}), tmp_path / "run")
    ledger = read_json(tmp_path / "run/rounds.json")
    for key in ("tokens", "flops", "seconds"):
        parts = [read_json(tmp_path / f"run/rounds/round-0{n}/training.json")[key] for n in (1, 2)]
        assert [one[key] for one in ledger["rounds"]] == parts
        assert ledger["total"][key] == ledger["rounds"][1]["cumulative"][key] == pytest.approx(sum(parts))
    assert ledger["reference"]["flops"] is None  # a folder that no run of Scion made


def test_what_cannot_be_matched_is_reported_and_the_best_is_the_result(grown, tmp_path, monkeypatch, capsys):
    script(monkeypatch, 0.5, 0.2, 0.3, 0.4)
    result = run_recipe(grown({"by": 1}), tmp_path / "run")
    ledger = result["growth"]
    assert [one["layers"] for one in ledger["rounds"]] == [2, 3, 4, 5]
    assert (ledger["outcome"], ledger["result_round"]) == ("not matched", 2)
    assert result["model"]["num_hidden_layers"] == 3
    assert "the reference is not matched: all 5 layers are in use" in capsys.readouterr().err
    assert read_json(tmp_path / "run/status.json")["state"] == "done"


def test_the_difference_is_of_the_files_and_of_every_held_out_window(grown, data_folder, tiny_folder, tmp_path):
    from scionlm.evaluation.loss import domain_losses, model_token_nll
    from scionlm.sources import load_hf_model, open_folder

    run_recipe(grown({"by": 1}, evaluate__tokens_per_domain=24), tmp_path / "run")
    one = read_json(tmp_path / "run/rounds.json")["rounds"][0]
    models = [
        load_hf_model(open_folder(p), torch.float32) for p in (tmp_path / "run/rounds/round-01/model", tiny_folder)
    ]
    mine, theirs = (domain_losses(model_token_nll(m), data_folder, ["alpha", "beta"], 24) for m in models)
    for name in mine:
        assert mine[name].num_tokens == data_folder.num_tokens(name, "held_out") - 1
        assert one["difference"]["domains"][name] == pytest.approx(mine[name].nll - theirs[name].nll, abs=1e-6)
    assert one["difference"]["mean"] == pytest.approx(sum(m.nll - theirs[n].nll for n, m in mine.items()) / 2, abs=1e-6)


def test_a_control_sees_as_much_as_the_childs_weights_have(grown, tmp_path, monkeypatch):
    script(monkeypatch, *[0.5] * 4)
    student = run_recipe(grown(STUDENT, control=True), tmp_path / "student")
    assert student["control"]["training"]["steps"] == 6
    source = run_recipe(grown(SOURCE, control=True), tmp_path / "source")
    assert source["control"]["training"]["steps"] == 3
    shape = read_json(tmp_path / "student/control/result.json")["model"]
    assert shape == student["model"]


def test_the_control_of_a_round_that_is_not_the_last(grown, tmp_path, monkeypatch):
    script(monkeypatch, 0.2, 0.5, 0.4, 0.3)
    result = run_recipe(grown({"from": "student", "by": 1}, control=True), tmp_path / "run")
    assert result["growth"]["result_round"] == 1
    assert result["control"]["training"]["steps"] == result["training"]["steps"] == 3
    assert read_json(tmp_path / "run/control/result.json")["model"]["num_hidden_layers"] == 2


def test_what_a_students_weights_have_seen_is_said_of_it(grown, tmp_path):
    result = run_recipe(grown(STUDENT), tmp_path / "run")
    rounds = result["growth"]["rounds"]
    assert result["training"]["tokens"] == sum(one["tokens"] for one in rounds) == 2 * rounds[0]["tokens"]
    assert (
        "192 in 6 steps".replace("192", f"{2 * rounds[0]['tokens']}") in (tmp_path / "run/model/README.md").read_text()
    )
    tokens = [line["tokens"] for line in metrics_of(tmp_path / "run") if "train/nll_nats" in line]
    assert tokens == [rounds[0]["tokens"] // 3 * n for n in range(1, 7)]


def test_the_text_that_decides_can_be_limited(grown, tmp_path):
    run_recipe(grown({"tokens_per_domain": 50}), tmp_path / "run")
    ledger = read_json(tmp_path / "run/rounds.json")
    assert ledger["reference"]["num_tokens"] == {"alpha": 50, "beta": 50}
    assert {loss["num_tokens"] for loss in ledger["rounds"][0]["domains"].values()} == {50}


def test_tolerance_and_criterion_of_the_recipe_decide(grown, tmp_path, monkeypatch):
    script(monkeypatch, *[0.05] * 4)
    assert run_recipe(grown({"tolerance": 0.05}), tmp_path / "mean")["rounds"] == 1
    script(monkeypatch, *[0.05] * 4)
    assert run_recipe(grown({"tolerance": 0.05, "criterion": "upper"}), tmp_path / "upper")["rounds"] == 3


def test_a_match_that_is_not_the_result_is_no_outcome(grown, tmp_path, monkeypatch):
    script(monkeypatch, -1.0, 1.0)
    growth = run_recipe(grown(SOURCE), tmp_path / "run")["growth"]
    assert [one["matched"] for one in growth["rounds"]] == [True, False]
    assert (growth["result_round"], growth["outcome"]) == (2, "not matched")
    assert growth["why"].startswith("the reference is not matched")


def test_state_follows_layers_that_move(grown, begun, tmp_path):
    """Layers 1 and 3 of the source become 0 and 1; with layer 0 before them they are 1 and 2."""
    grow = STUDENT | {"optimizer_state": "keep"}
    run_recipe(grown(grow, inherit={"keep": [1, 3]}), tmp_path / "run")
    before = find_checkpoint(tmp_path / "run/rounds/round-01").tensors("optimizer")
    kept = begun["round-02 optimizer"]
    for new, old in ((1, 0), (2, 1)):
        name = "model.layers.{}.mlp.up_proj.weight/exp_avg"
        assert torch.equal(kept[name.format(new)], before[name.format(old)])
    assert not any(key.startswith("model.layers.0.") for key in kept)


def test_an_average_is_what_is_measured_and_grows(grown, tmp_path):
    recipe = grown(STUDENT | {"init": "zero_output"}, average={"decay": 0.9}, export__dtype="float32")
    run_recipe(recipe, tmp_path / "run")
    first, second = (read_json(tmp_path / f"run/rounds/round-0{n}/result.json") for n in (1, 2))
    for domain, loss in first["domains"].items():
        assert second["before"][domain]["nll"] == pytest.approx(loss["nll"], abs=1e-5)


def test_rounds_whose_weights_of_domains_move(grown, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    moving = {"rule": "paper", "every": 1, "tokens_per_domain": 40, "step_size": 40.0, "reference": "best"}
    run_recipe(grown(SOURCE | {"max_layers": 2}, reweight=moving, control=True), tmp_path / "run")
    steps = [tuple(map(tuple, step)) for step in watch.samples]
    assert steps[:3] == steps[3:]  # the control follows its child
    assert any("reweight/alpha/weight" in line for line in metrics_of(tmp_path / "run"))


def test_rounds_of_stages_that_replay(grown, tmp_path):
    stages = [{"name": "a"}, {"name": "b", "replay": {"stage": "a", "fraction": 0.5}}]
    run_recipe(grown(SOURCE, stages=stages), tmp_path / "run")
    for number in (1, 2):
        assert (tmp_path / f"run/rounds/round-0{number}/stages/a").is_dir()
    assert not (tmp_path / "run/stages").exists()


def test_a_round_replays_its_own_stage_from_its_beginning(grown, tmp_path, monkeypatch):
    """Also where it goes on in the text: its ledger is another one than that of the round before."""
    watch = Watch(monkeypatch)
    replay = {"stage": "a", "fraction": 0.5, "order": "original"}
    stages = [{"name": "a", "train": {"steps": 2}}, {"name": "b", "train": {"steps": 4}, "replay": replay}]
    run_recipe(grown(STUDENT, stages=stages), tmp_path / "run")
    rounds = [watch.samples[:6], watch.samples[6:]]
    for steps in rounds:
        seen = [(sample.domain, sample.draw) for step in steps[:2] for sample in step]
        again = [(s.domain.removeprefix(REPLAYED), s.draw) for step in steps[2:] for s in step if REPLAYED in s.domain]
        assert again == seen[: len(again)]
        assert len(again) == 8


def test_a_source_with_somebody_elses_result_beside_it(grown, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "result.json").write_text('{"acc": 1}')
    run_recipe(grown(SOURCE, source=str(tmp_path / "model")), tmp_path / "run")
    assert read_json(tmp_path / "run/rounds.json")["reference"]["tokens"] is None


@pytest.mark.parametrize("grow", [STUDENT | {"optimizer_state": "keep"}, SOURCE], ids=["student", "source"])
def test_no_stop_changes_anything(grow, grown, tmp_path, monkeypatch):
    """Inside a round and between rounds, at every step (G4)."""
    recipe = grown(grow, control=True)
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stops = range(1, 13) if grow["from"] == "student" else (1, 3, 4, 6, 9)
        assert run_stopped(recipe, tmp_path / "parts", Watch(patch, stops)) == len(stops)
    for name in ("rounds.json", "result.json", "rounds/round-02/result.json", "rounds/source.json"):
        assert timeless(read_json(tmp_path / "parts" / name)) == timeless(read_json(tmp_path / "whole" / name)), name
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_stopped_while_validating(grown, tmp_path, monkeypatch):
    recipe = grown(STUDENT)
    run_recipe(recipe, tmp_path / "whole")
    measured, calls = growth_module.measured, iter(range(9))

    def stopping(setting, *arguments):
        if next(calls) in (0, 2, 4):
            raise StoppedError("stopped")
        return measured(setting, *arguments)

    monkeypatch.setattr(growth_module, "measured", stopping)
    for _ in range(3):
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
    run_recipe(recipe, tmp_path / "parts")
    assert timeless(read_json(tmp_path / "parts/rounds.json")) == timeless(read_json(tmp_path / "whole/rounds.json"))


@pytest.mark.parametrize(
    ("grow", "changes", "message"),
    [
        ({"max_layers": 1}, {}, "grow.max_layers 1: the first round has 2 layers already"),
        ({"max_layers": 6}, {}, "the source has 5 layers"),
        ({"max_tokens": 100}, {}, "grow.max_tokens 100: one round takes"),
        ({"fromm": "student"}, {}, "did you mean 'from'"),
        ({"base": "student"}, {}, "unknown key 'grow.base'"),
        ({"tolerance": -1}, {}, "grow.tolerance"),
        ({"from": "student"}, {"control": True, "stages": [{"name": "a"}, {"name": "b"}]}, "one stage"),
        ({}, {"branch": {"run": "somewhere"}}, "a branch goes on"),
        ({"from": "student"}, {"inherit": {"layers": 2, "intermediate_size": 24}}, "wider than the child's"),
        ({}, {"inherit": {"keep": [0, 2], "intermediate_size": 24}}, "wider than the child's"),
        ({"from": "student"}, {"inherit": {"keep": [1, 0]}}, "not some of the donor's, each once and in order"),
        ({"from": "student"}, {"inherit": {"layers": 2, "init": "random"}}, "the child began at random"),
        (
            {"from": "student"},
            {"inherit": {"layers": 2, "fresh": ["mlp"]}},
            "what inherit.fresh leaves out",
        ),
        ({"by": 1}, {"inherit": {"strategy": "hybrid_stack", "layers": 2}}, "3 cannot be made with hybrid_stack"),
        ({"from": "student"}, {"control": True, "reweight": {"every": 1}}, "fixed weights"),
    ],
)
def test_rounds_that_cannot_be_are_refused(grow, changes, message, grown, tmp_path):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        run_recipe(grown(grow, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_reads_back_as_it_was(grown, tmp_path):
    recipe = grown(STUDENT | {"optimizer_state": "keep"})
    again = type(recipe).model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_grow_what_one_process_grows(layout, grown, pair, tmp_path):
    grow = STUDENT | {"optimizer_state": "keep"}
    run_recipe(grown(grow), tmp_path / "alone")
    answers = pair.run(grown(grow, train__parallel=layout), tmp_path / "pair")
    assert [answer["error"] for answer in answers] == [None, None]
    for out in ("alone", "pair"):
        assert read_json(tmp_path / out / "rounds.json")["rounds"][1]["layers"] == 3
    mine, theirs = (read_json(tmp_path / out / "rounds.json")["rounds"] for out in ("pair", "alone"))
    for one, other in zip(mine, theirs, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert one["difference"]["high"] == pytest.approx(other["difference"]["high"], abs=1e-4)


def test_state_for_some_weights_only_is_an_error_elsewhere(tiny_folder):
    from factories import tiny_model
    from scionlm.core.errors import DataError
    from scionlm.train.optimizer import OptimizerSettings
    from scionlm.train.shards import InMemory

    model = tiny_model()
    optimizer = Optimizer(model, OptimizerSettings())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step(1e-3)
    state = {k: v for k, v in optimizer.tensors().items() if not k.startswith("model.layers.4.")}
    other = Optimizer(model, OptimizerSettings())
    with pytest.raises(DataError, match="another model"):
        other.load(InMemory(state))
    other.load(InMemory(state), some=True)
    assert other.tensors().keys() == state.keys()
