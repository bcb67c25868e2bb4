"""Shearing: what pruning leaves is the masked source, the recovery goes on from it, and no stop changes anything."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
from safetensors.torch import load_file

from factories import VOCAB_SIZE, model_folder
from features import MOVING
from scionlm.core.errors import StoppedError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.families import ModelShape, family_of
from scionlm.families.registry import FAMILIES
from scionlm.recipes import pruned as pruned_module
from scionlm.recipes import pruning, shear_steps, training
from scionlm.recipes.config_shear import PruneConfig
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.pruned import moved_shares
from scionlm.recipes.run import run_recipe
from scionlm.recipes.selection import importance_scores
from scionlm.sources import open_folder
from scionlm.surgery.indices import parse_indices
from scionlm.train.checkpoint import find_checkpoint
from scionlm.train.gates import concrete
from scionlm.train.gates.axes import Axis
from scionlm.train.gates.constraint import ConstraintSettings
from scionlm.train.gates.pruner import Pruner
from whole_runs import SETTINGS, Watch, metrics_of, quicken, run_stopped, timeless, weights_of

TARGET = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def shear(tiny_folder, data_folder):
    """Return a recipe that prunes the tiny model."""

    def shear(prune, **changes):
        settings = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")}
        settings |= {"source": str(tiny_folder), "data.dir": str(data_folder.path), "target": TARGET, "prune": prune}
        settings |= {"train.steps": 4, "evaluate.every": 1}
        return load_recipe("shear", settings | {key.replace("__", "."): value for key, value in changes.items()})

    return shear


MASKS = {"method": "masks", "steps": 6, "gates": {"lr": 1.0, "start": "open"}}


def test_masks_end_at_the_target_and_the_recovery_goes_on_behind_them(shear, tmp_path):
    out = tmp_path / "run"
    result = run_recipe(shear(MASKS), out)
    pruned = result["prune"]
    shape = ModelShape.of(open_folder(out / "prune" / "model").config)
    assert {key: getattr(shape, key) for key in TARGET} == TARGET
    assert ModelShape.of(open_folder(out / "model").config) == shape
    assert any("masked source" in check for check in pruned["checks"])
    for domain, loss in pruned["masked"].items():
        assert pruned["domains"][domain]["nll"] == pytest.approx(loss["nll"], abs=1e-5)
    assert result["before"]["alpha"]["nll"] == pytest.approx(pruned["domains"]["alpha"]["nll"], abs=1e-5)
    training = result["training"]
    assert [training["steps"], training["recovery"]["steps"], training["pruning"]["steps"]] == [10, 4, 6]
    first, second = (find_checkpoint(folder).state for folder in (out / "prune", out))
    taken = {name: number for name, number in first["plan"]["counts"].items()}
    assert all(second["plan"]["counts"][name] > number for name, number in taken.items())
    lines = [line for line in read_jsonl(out / "prune" / "metrics.jsonl") if "prune/hidden_open_share" in line]
    assert len(lines) == 6


def test_no_stop_changes_anything(shear, tmp_path, monkeypatch):
    """In the masks and in the recovery, at every step: gates, weights of domains, cursors, control."""
    gates = {"lr": 0.5, "start": "activation", "finish": 2}
    recipe = shear(
        MASKS | {"gates": gates, "reweight": MOVING, "data": {"seq_len": 16}, "train": {"global_batch_tokens": 64}},
        train__micro_batch_size=2,
        optimizer__name="muon",
    )
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        assert run_stopped(recipe, tmp_path / "parts", Watch(patch, range(1, 11))) == 10
    for name in ("result.json", "prune/result.json", "prune/masks.json"):
        assert timeless(read_json(tmp_path / "parts" / name)) == timeless(read_json(tmp_path / "whole" / name)), name
    for place in ("", "prune"):
        mine, other = tmp_path / "parts" / place, tmp_path / "whole" / place
        assert weights_of(mine) == weights_of(other)
        assert metrics_of(mine) == metrics_of(other)


def test_what_is_left_and_its_control_have_the_target_and_as_many_steps(shear, tmp_path):
    result = run_recipe(shear(MASKS, control=True), tmp_path / "run")
    control = open_folder(tmp_path / "run" / "control" / "model")
    assert ModelShape.of(control.config) == ModelShape.of(open_folder(tmp_path / "run" / "model").config)
    assert result["control"]["training"]["steps"] == result["training"]["steps"]


@pytest.mark.parametrize("tokens", [None, 6], ids=["at once", "with training between"])
def test_scores_prune_in_steps_of_a_third(shear, tmp_path, tokens):
    result = run_recipe(shear({"method": "scores", "steps": tokens}), tmp_path / "run")
    steps = result["prune"]["pruning_steps"]
    assert len(steps) > 1
    assert {key: steps[-1]["shape"][key] for key in TARGET} == TARGET
    sizes = [40, *(step["shape"]["hidden_size"] for step in steps)]
    assert all(after >= 0.6 * before for before, after in pairwise(sizes))
    assert result["prune"]["training"]["steps"] == (tokens or 0)
    assert ModelShape.of(open_folder(tmp_path / "run" / "model").config).hidden_size == TARGET["hidden_size"]
    alone = run_recipe(shear({"method": "scores", "iterations": 1}), tmp_path / "alone")
    assert len(alone["prune"]["pruning_steps"]) == 1


@pytest.mark.parametrize("method", ["first", "random"])
def test_what_choosing_has_to_be_better_than(method, shear, tmp_path):
    recipe = shear({"method": method})
    result = run_recipe(recipe, tmp_path / "run")
    assert result["inherit"]["strategy"].startswith(method)
    assert result["inherit"]["width"]["importance"] == method
    keep = result["inherit"]["keep"]
    assert (keep == [0, 1, 2]) == (method == "first")
    assert run_recipe(recipe, tmp_path / "again")["domains"] == result["domains"]


# Gates of LLM-Shearing (2310.06694): the paper's appendix A and table 7, and the constants of its code.
PUBLISHED = {"lr": 1.0, "multiplier_lr": 1.0, "ascent": "adam", "start": "open", "constraint": "published", "finish": 0}
TEMPERATURES = {"paper": 0.83, "code": 2 / 3}


@pytest.mark.parametrize("fidelity", TEMPERATURES)
def test_what_fidelity_says_of_gates_is_what_was_published(fidelity):
    found = PruneConfig(steps=3200).gate_settings(fidelity)
    neither = {"cap": None, "sharpen": 1.0, "depth": "layers", "warmup": 640 / 3200}
    expected = PUBLISHED | neither | {"temperature": TEMPERATURES[fidelity]}
    assert {key: found[key] for key in expected} == expected
    assert found.keys() - expected.keys() == {"spread"}


@pytest.mark.parametrize("fidelity", TEMPERATURES)
def test_masks_that_are_soft_at_the_end_are_folded_into_what_is_left(shear, tmp_path, monkeypatch, fidelity):
    opened = []
    monkeypatch.setattr(pruning, "Pruner", lambda *parts: opened.append(Pruner(*parts)) or opened[-1])
    result = run_recipe(shear({"method": "masks", "steps": 6}, fidelity=fidelity), tmp_path / "run")
    assert any(axis["folded"] for axis in result["prune"]["axes"])
    for domain, loss in result["prune"]["masked"].items():
        assert result["prune"]["domains"][domain]["nll"] == pytest.approx(loss["nll"], abs=1e-5)
    pruner, settings = opened[0], opened[0].settings
    assert pruner.gates.temperature == TEMPERATURES[fidelity]
    assert settings.constraint == ConstraintSettings(calibrated=False, by_row=fidelity == "paper", warmup=1)
    assert (settings.by_code, settings.finish, settings.ascent, settings.lr) == (True, 6, "adam", 1.0)


def test_the_recovery_goes_on_with_the_weights_of_domains_and_the_teacher(shear, tmp_path):
    recipe = shear(MASKS, reweight=MOVING, distill={"teacher": "source"})
    result = run_recipe(recipe, tmp_path / "run")
    last = [line for line in read_jsonl(tmp_path / "run/prune/metrics.jsonl") if "reweight/alpha/weight" in line][-1]
    first = next(line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "train/divergence_nats" in line)
    assert last["reweight/alpha/weight"] != 0.5
    state = find_checkpoint(tmp_path / "run" / "prune").state
    assert state["reweight"]["weights"]["alpha"] == last["reweight/alpha/weight"]
    moved = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "reweight/alpha/weight" in line]
    assert first["step"] == 1
    assert moved
    ledger = [line for line in read_jsonl(tmp_path / "run/ledger.jsonl") if "phases" in line]
    ledger = ledger[0]["phases"]
    asked = next(phase["asked"] for phase in ledger if "asked" in phase)
    assert asked["alpha"] == pytest.approx(last["reweight/alpha/weight"])
    assert result["training"]["distill"] is not None
    taught = [line for line in read_jsonl(tmp_path / "run/prune/metrics.jsonl") if "train/divergence_nats" in line]
    assert len(taught) == 6


def test_domains_that_pruning_did_not_see_keep_their_share():
    found = moved_shares({"a": 0.3, "b": 0.2, "c": 0.5}, {"a": 0.9, "b": 0.1, "d": 4.0})
    assert found == pytest.approx({"a": 0.45, "b": 0.05, "c": 0.5})
    assert moved_shares({"c": 1.0}, {"a": 1.0}) == {"c": 1.0}


def test_a_control_has_as_many_tokens_whatever_the_batch_of_the_pruning(shear, tmp_path):
    prune = MASKS | {"train": {"global_batch_tokens": SETTINGS["train.global_batch_tokens"] // 4}}
    result = run_recipe(shear(prune, control=True), tmp_path / "run")
    tokens = result["training"]["tokens"]
    batch = SETTINGS["train.global_batch_tokens"]
    assert tokens <= result["control"]["training"]["tokens"] < tokens + batch


def test_each_step_is_scored_on_what_the_one_before_left(shear, tmp_path):
    run_recipe(shear({"method": "scores"}), tmp_path / "run")
    seen = [tmp_path / "run", *sorted((tmp_path / "run/prune").glob("step-0[2-9]"))]
    assert len(seen) > 1
    for number, folder in enumerate(seen):
        record = read_json(folder / "analysis/analysis.json")["model"]
        of = tmp_path / f"run/prune/step-0{number}/model" if number else None
        layers = 5 if of is None else ModelShape.of(open_folder(of).config).num_hidden_layers
        assert record["num_hidden_layers"] == layers
        assert of is None or record["weights_sha256"] == open_folder(of).weights_fingerprint()


def test_a_kill_before_the_record_of_the_masks_does_no_harm(shear, tmp_path, monkeypatch):
    def dies(*arguments):
        raise KeyboardInterrupt

    recipe = shear(MASKS)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_record", dies)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run/prune/model").exists()
    assert run_recipe(recipe, tmp_path / "run")["prune"]["checks"]


def test_the_constants_without_torch_are_those_with_it():
    assert shear_steps.LOG_LIMIT == concrete.LIMIT
    assert pytest.approx(math.log(-concrete.GAMMA / concrete.ZETA)) == shear_steps.LOG_STRETCH


def test_apart_attention_and_mlp_leave_whole_layers(shear, tmp_path):
    gates = MASKS["gates"] | {"depth": "blocks"}
    result = run_recipe(shear(MASKS | {"gates": gates}), tmp_path / "run")
    assert [axis["name"] for axis in result["prune"]["axes"][:2]] == ["attention", "mlp"]
    assert len(result["inherit"]["keep"]) == 3


def highest(scores, count):
    """Return the `count` highest of each row, in order."""
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:count]) for row in scores.tolist()]


@pytest.mark.parametrize("depth", ["layers", "blocks"])
def test_gates_that_begin_by_activation_keep_what_is_most_active(shear, tmp_path, monkeypatch, depth):
    """Gates that do not move; two groups of two heads each become one of one. Negated scores are the control."""
    measured = {}

    def noting(*arguments, **keywords):
        found = importance_scores(*arguments, **keywords)
        measured.update(found)
        return {name: sign * rows for name, rows in found.items()}

    def kept(out):
        target = TARGET | {"num_attention_heads": 1}
        recipe = shear(prune, target=target, train__steps=1, evaluate__every=0, evaluate__tokens_per_domain=24)
        axes = run_recipe(recipe, tmp_path / out)["prune"]["axes"]
        return {axis["name"]: [parse_indices(row, axis["units"]) for row in axis["kept"]] for axis in axes}

    monkeypatch.setattr(pruning, "importance_scores", noting)
    gates = {"lr": 1e-9, "sharpen": 1.0, "start": "activation", "depth": depth}
    prune = {"method": "masks", "steps": 3, "gates": gates}
    sign = 1
    found = kept("own")
    layers = highest(measured["layers"][None], 3)
    assert found == {
        **({"layers": layers} if depth == "layers" else {"attention": layers, "mlp": layers}),
        "hidden": highest(measured["hidden"][None], 24),
        "groups": highest(measured["heads"].reshape(5, 2, 2).sum(2), 1),
        "heads": highest(measured["heads"].reshape(10, 2), 1),
        "ffn": highest(measured["ffn"], 32),
    }
    sign = -1
    negated = kept("negated")
    assert all(negated[name] != rows for name, rows in found.items())


def test_a_group_is_worth_what_its_heads_are_together():
    start = pruning._start({"heads": np.array([[3.0, 0.0, 2.0, 2.0]])}, 1.5, [Axis("groups", 1, 2, 1)])
    assert start["groups"].tolist() == [[pytest.approx(concrete.LIMIT - 1.5), pytest.approx(concrete.LIMIT)]]


ALIKE = ("mistral", "qwen2", "smollm3", "granite", "phi3", "olmo3", "gemma2", "starcoder2", "gpt_neox", "cohere2")


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(model_type, marks=[pytest.mark.slow] if model_type in ALIKE else [])
        for family in FAMILIES
        for model_type in family.model_types
    ],
)
def test_every_family_is_pruned_and_trained(model_type, shear, tmp_path):
    """Masks and cuts of all variants are in the tests of the gates."""
    source = model_folder(tmp_path / "source", model_type=model_type)
    shape = ModelShape.of(open_folder(source).config)
    family = family_of(open_folder(source).config)
    target = {"num_hidden_layers": 3, "intermediate_size": 32}
    if not family.has_head_dim:
        target |= {"hidden_size": 2 * shape.head_dim, "num_attention_heads": 2}
    else:
        target |= {"hidden_size": 24, "num_attention_heads": 2}
    prune = MASKS | {"steps": 3, "gates": {"finish": 1, "start": "open"}}
    changes = {"train__steps": 1, "evaluate__tokens_per_domain": 24}
    result = run_recipe(shear(prune, source=str(source), target=target, **changes), tmp_path / "run")
    found = ModelShape.of(open_folder(tmp_path / "run" / "model").config)
    assert {key: getattr(found, key) for key in target} == target
    assert any("masked source" in check for check in result["prune"]["checks"])


def test_two_ranks_score_what_one_process_scores(shear, pair, tmp_path):
    prune = {"method": "scores", "steps": 4}
    run_recipe(shear(prune), tmp_path / "alone")
    answers = pair.run(shear(prune), tmp_path / "pair")
    assert [answer["error"] for answer in answers] == [None, None]
    mine, other = (read_json(tmp_path / out / "result.json") for out in ("pair", "alone"))
    assert mine["prune"]["plan"] == other["prune"]["plan"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_prune_what_one_process_prunes(layout, shear, pair, tmp_path):
    prune = MASKS | {"gates": {"lr": 0.5, "start": "activation", "finish": 2}}
    changes = {"train__micro_batch_size": 1, "reweight": MOVING}
    run_recipe(shear(prune, **changes), tmp_path / "alone")
    answers = pair.run(shear(prune, train__parallel=layout, **changes), tmp_path / "pair")
    assert [answer["error"] for answer in answers] == [None, None]
    mine, other = (read_json(tmp_path / out / "result.json") for out in ("pair", "alone"))
    assert mine["inherit"]["keep"] == other["inherit"]["keep"]
    for name, loss in other["domains"].items():
        assert mine["prune"]["domains"][name]["nll"] == pytest.approx(other["prune"]["domains"][name]["nll"], rel=1e-5)
        assert mine["domains"][name]["nll"] == pytest.approx(loss["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": {"hidden_size": 48, "num_attention_heads": 3}}, "hidden_size 48.*num_attention_heads"),
        ({"target": {"num_hidden_layers": 5}}, "source itself|nothing"),
        ({"target": {"shape": "lama"}}, "unknown"),
        ({"prune": {"method": "masks"}}, "prune.tokens or prune.steps"),
        ({"prune": {"method": "first", "steps": 3}}, "without training"),
        ({"prune": {"method": "masks", "steps": 3, "importance": "taylor"}}, "for method scores"),
        ({"fidelity": "paper-text"}, "fidelity of recipe shear"),
        ({"inherit": {"layers": 2}}, "leave inherit out"),
        ({"control": True, "reweight": MOVING}, "leave control out"),
        ({"prune": MASKS | {"gates": {"warmup": 4, "finish": 2}}}, "leave no step of 6"),
        ({"prune": MASKS | {"gates": {"finish": "10 min"}}}, "times are for the recovery"),
        ({"prune": {"method": "scores", "strategy": "blok"}}, "unknown"),
        ({"prune": {"method": "scores", "strategy": "potent_prefix"}}, "the target does"),
        ({"prune": {"method": "scores", "iterations": 0}}, "greater than or equal to 1"),
        ({"prune": {"method": "scores", "iterations": 40}}, "cannot be made"),
        ({"prune": {"method": "scores"}, "fidelity": "paper"}, "learns none"),
        (
            {"distill": {"teacher": "source", "schedule": "linear", "until": 7}, "train__steps": 9},
            "longer than the run",
        ),
        ({"target": TARGET | {"shape": "pythia-70m"}}, "other sizes|leave"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes, words, shear, tmp_path):
    with pytest.raises(UsageError, match=words):
        run_recipe(
            shear(changes.get("prune", MASKS), **{k: v for k, v in changes.items() if k != "prune"}), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_budget_becomes_sizes_once(shear, tmp_path, tiny_folder):
    recipe = shear(MASKS, target={"parameters": 30_000})
    result = run_recipe(recipe, tmp_path / "run")
    assert 20_000 < result["model"]["num_parameters"] <= 30_000
    assert run_recipe(recipe, tmp_path / "run")["domains"] == result["domains"]


def test_the_plan_counts_pruning_and_recovery(shear):
    plan = plan_recipe(shear(MASKS, control=True))
    by_name = {part["name"]: part for part in plan["rounds"]}
    assert list(by_name) == ["pruning", "recovery", "control"]
    assert plan["num_tokens"] == by_name["pruning"]["num_tokens"] + by_name["recovery"]["num_tokens"]
    assert by_name["control"]["num_tokens"] == plan["num_tokens"]
    assert by_name["pruning"]["num_parameters"] > plan["num_parameters"] == by_name["recovery"]["num_parameters"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("groups", [4, 2], ids=["heads alone", "grouped heads"])
def test_source_and_what_is_left_have_as_many_parameters_as_the_plan_says(groups, tied, shear, tmp_path):
    def expected(layers, d, m, heads, kv_heads, head_dim=8):
        tables = VOCAB_SIZE * d * (1 if tied else 2)
        return tables + layers * (2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + 3 * d * m + 2 * d) + d

    def found(folder):
        return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())

    source = model_folder(tmp_path / "source", num_key_value_heads=groups, tie_word_embeddings=tied)
    prune = MASKS | {"steps": 3, "gates": {"finish": 1, "start": "open"}}
    changes = {"train__steps": 1, "evaluate__tokens_per_domain": 24}
    target = TARGET | {"num_key_value_heads": groups // 2}
    recipe = shear(prune, source=str(source), target=target, **changes)
    planned = plan_recipe(recipe)
    result = run_recipe(recipe, tmp_path / "run")
    before, after = expected(5, 32, 48, 4, groups), expected(3, 24, 32, 2, groups // 2)
    assert {part["name"]: part["num_parameters"] for part in planned["rounds"]} == {
        "pruning": before,
        "recovery": after,
    }
    assert found(source) == before
    assert found(tmp_path / "run/prune/model") == found(tmp_path / "run/model") == after
    assert planned["num_parameters"] == result["model"]["num_parameters"] == after
    assert result["prune"]["shape"]["num_parameters"] == after


@pytest.mark.parametrize(
    "changes", [{}, {"reweight": MOVING}, {"prune": MASKS | {"reweight": None}, "reweight": MOVING}]
)
def test_the_recipe_reads_back_as_it_was(changes, shear):
    others = {key: value for key, value in changes.items() if key != "prune"}
    recipe = shear(changes.get("prune", MASKS), **others)
    again = type(recipe).model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    assert again.pruning_stage == recipe.pruning_stage


@pytest.mark.parametrize(
    ("prune", "scales", "message"),
    [
        (MASKS, {"4": 0.5}, "a model of 3 layers has no 4"),
        (MASKS, {"0-1,1": 0.5}, "names layer 1 twice"),
        ({"method": "scores", "steps": 4}, {"nose": 0.5}, "has no 'nose'"),
    ],
)
def test_rates_of_layers_that_the_recovery_has_not_are_refused_before_pruning(prune, scales, message, shear, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_recipe(shear(prune, optimizer__lr_scales=scales), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prune", [MASKS, {"method": "scores", "steps": 6, "iterations": 1}], ids=["masks", "scores"])
def test_the_recovery_needs_no_checkpoint_of_the_pruning_once_it_has_its_own(shear, tmp_path, monkeypatch, prune):
    recipe = shear(prune, checkpoint__every=1, reweight=MOVING)
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        watch = Watch(patch, [8])  # the second step of the recovery
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
    checkpoints = list((tmp_path / "parts/prune").rglob("checkpoints"))
    assert len(checkpoints) == 1
    shutil.rmtree(checkpoints[0])
    run_recipe(recipe, tmp_path / "parts")
    assert len(watch.batches) == 8
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("prune", [MASKS, {"method": "scores", "steps": 6, "iterations": 1}], ids=["masks", "scores"])
def test_a_stop_in_the_last_step_of_pruning_takes_no_move_of_the_weights(shear, tmp_path, monkeypatch, prune):
    recipe = shear(prune, reweight=MOVING)
    run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Watch(patch, [6])
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "parts")
    run_recipe(recipe, tmp_path / "parts")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    whole, parts = (read_json(tmp_path / name / "prune/result.json")["weights"] for name in ("whole", "parts"))
    assert parts == whole


@pytest.mark.parametrize("method", ["masks", "scores"])
def test_the_recovery_begins_with_the_weights_of_the_last_step_of_pruning(shear, tmp_path, monkeypatch, method):
    """They are moved after the last step too, and the recipe's own are what they are led back to all along."""
    began = []
    opened = training.open_reweighting

    def noted(setting, inputs, *more):
        began.append((inputs.sampling.mixture.shares, inputs.prior))
        return opened(setting, inputs, *more)

    monkeypatch.setattr(training, "open_reweighting", noted)
    prune = MASKS | {"method": method} if method == "masks" else {"method": "scores", "steps": 6, "iterations": 1}
    run_recipe(shear(prune, reweight=MOVING), tmp_path / "run")
    folder = tmp_path / "run/prune" / ("" if method == "masks" else "step-01")
    moved = [line for line in read_jsonl(folder / "metrics.jsonl") if "reweight/alpha/weight" in line]
    assert [line["step"] for line in moved] == [2, 4, 6]
    (own, nothing), *_, (shares, prior) = began
    assert nothing is None
    assert prior == own
    assert shares["alpha"] == pytest.approx(moved[-1]["reweight/alpha/weight"])
    assert shares != own


def test_a_pruned_models_result_is_whole_while_its_control_is_trained(shear, tmp_path, monkeypatch):
    recipe = shear(MASKS, control=True)
    with monkeypatch.context() as patch:
        Watch(patch, [12])  # 6 of pruning, 4 of recovery, the second of the control
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
    result = read_json(tmp_path / "run/result.json")
    assert "control" not in result
    assert result["training"]["steps"] == 10
    assert result["prune"]["method"] == "masks"
    whole = run_recipe(recipe, tmp_path / "run")
    assert whole["control"]["training"]["steps"] == 10
    assert timeless({k: v for k, v in whole.items() if k not in ("control", "samples")}) == timeless(
        {k: v for k, v in result.items() if k != "samples"}
    )


def test_steps_of_pruning_that_are_too_short_for_their_schedule_are_refused(shear, tmp_path):
    prune = {"method": "scores", "steps": 10, "schedule": {"warmup": 6}}
    with pytest.raises(UsageError, match=r"prune\.iterations: step 1 has \d+ optimizer steps"):
        run_recipe(shear(prune), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_domains_go_from_one_step_of_pruning_to_the_next(shear, tmp_path, monkeypatch):
    begins = []
    stretch = pruned_module.with_weights

    def noted(inputs, weights):
        begins.append(weights)
        return stretch(inputs, weights)

    monkeypatch.setattr(pruned_module, "with_weights", noted)
    run_recipe(shear({"method": "scores", "steps": 12}, reweight=MOVING | {"every": 1}), tmp_path / "run")
    steps = sorted((tmp_path / "run/prune").glob("step-*"))
    assert len(steps) > 1
    ended = [find_checkpoint(step).state["reweight"]["weights"] for step in steps]
    assert begins[: len(steps)] == [None, *ended[:-1]]
    assert len({json.dumps(one, sort_keys=True) for one in ended}) == len(ended)
