"""What is measured of a source before it is trained: chosen as the analysis says, once, and kept over a stop."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from factories import model_folder
from scionlm import api
from scionlm.analysis import forward, gradients, importance, removal
from scionlm.analysis.ranking import CRITERIA, suggest
from scionlm.core.errors import DataError, StoppedError, UsageError
from scionlm.core.records import read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data.folder import TokenStream
from scionlm.families import ModelShape, family_of
from scionlm.parallel import runtime
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes import child, inheritune
from scionlm.recipes import scores as scores_module
from scionlm.recipes import selection as selection_module
from scionlm.recipes.analysis_options import options_of
from scionlm.recipes.analyze import analyze_folder
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.measured import choose_layers
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.run import run_recipe
from scionlm.recipes.scores import Scorer
from scionlm.recipes.selection import plan_of, record_plan, recorded_plan, selected
from scionlm.report import render_report
from scionlm.sources import ModelFolder, load_hf_model, open_folder, resolve
from scionlm.surgery.indices import parse_indices
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.width import WidthTarget, plan_width
from whole_runs import Watch, outcome, quicken, recipe_of

OPTIONS = {"seq_len": 16, "num_sequences": 6, "loss_sequences": 3}


@pytest.fixture(scope="module")
def looked(tmp_path_factory, tiny_folder, data_folder):
    """A finished analysis of the tiny model, with greedy removal down to three layers."""
    out = tmp_path_factory.mktemp("looked") / "looked"
    analyze_folder(str(tiny_folder), str(data_folder.path), out, options_of(OPTIONS | {"greedy": 2, "layers": 3}))
    return out


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """A model of the tiny one's shape with other weights."""
    return model_folder(tmp_path_factory.mktemp("sibling") / "sibling", seed=7)


@pytest.fixture
def recipe(tiny_folder, data_folder, monkeypatch):
    """Return a recipe by what is inherited."""
    quicken(monkeypatch.setattr)

    def make(inherit, **more):
        return recipe_of(tiny_folder, data_folder.path, inherit=inherit, **more)

    return make


@pytest.fixture
def measured(monkeypatch):
    """What is measured from now on."""
    calls = []
    for module, name in (
        (forward, "forward_pass"), (gradients, "gradient_pass"), (removal, "removal_losses"),
        (removal, "lens_losses"), (removal, "greedy_removal"), (importance, "activation_scores"),
        (importance, "taylor_scores"),
    ):  # fmt: skip
        original = getattr(module, name)

        def counted(*arguments, original=original, name=name, **keywords):
            calls.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, counted)
    return calls


def chosen(recipe, data_folder, folder):
    domains = list(recipe.data.mixture or data_folder.domains)
    return selected(recipe, resolve(recipe.source), data_folder, domains, folder, StopRequest(), ALONE)


# --- the choice ---


def handmade(ranks, greedy=None):
    """Return what an analysis of layers with these MaxRanks would hold; every criterion ranks them otherwise."""
    total = len(ranks)
    rng = np.random.default_rng(0)
    scores = {name: rng.permutation(total).astype(float) for name in CRITERIA} | {"max_rank": np.array(ranks)}
    angular = rng.random((total + 1, total + 1))
    record = {
        "layers": [{"max_rank": rank} for rank in ranks],
        "lazy_tolerance": 0.5,
        "criteria": [{"name": name, "scores": values.tolist()} for name, values in scores.items()],
        "angular": angular.tolist(),
        "greedy": None if greedy is None else {"order": greedy},
    }
    return record, scores, angular


def test_every_strategy_gives_what_the_analysis_suggests():
    record, scores, angular = handmade([9.0, 4.0, 1.0, 30.0, 1.2, 1.1], greedy=[4, 0, 2])
    found = suggest(scores, 3, angular, [4, 0, 2], 0.5)
    assert {each.by for each in found} == {
        *CRITERIA,
        "first",
        "angular_block",
        "greedy",
        "before_lazy_group",
        "potent_prefix",
    }
    for each in found[1:]:
        number = None if each.by in ("before_lazy_group", "potent_prefix") else 3
        assert choose_layers(record, each.by, number, "it") == (each.keep, each.by)
    assert len({tuple(each.keep) for each in found}) > 8


@pytest.mark.parametrize(
    ("ranks", "layers", "prefix", "before"),
    [
        ([9.0, 4.0, 1.0, 3.0, 1.2, 1.1], None, (2, ""), (2, "")),
        ([9.0, 4.0, 1.0, 30.0, 1.2, 1.1], None, (2, ""), (4, "")),
        ([9.0, 4.0, 1.0, 30.0, 1.2, 1.1], 3, (2, ":3"), (3, ":3")),
        ([9.0, 4.0, 2.0, 30.0, 4.0, 4.0], None, (3, ":half"), (3, ":half")),
        ([9.0, 4.0, 2.0, 30.0, 4.0, 4.0], 4, (4, ":4"), (4, ":4")),
        ([1.0, 4.0, 2.0, 30.0, 4.0, 4.0], None, (3, ":half"), (3, ":half")),
        ([1.0, 4.0, 2.0, 30.0, 1.0, 1.0], 2, (2, ":2"), (2, ":2")),
    ],
)
def test_how_many_the_ranks_speak_for(ranks, layers, prefix, before):
    record, _, _ = handmade(ranks)
    for name, (number, how) in (("potent_prefix", prefix), ("before_lazy_group", before)):
        assert choose_layers(record, name, layers, "it") == (list(range(number)), name + how)


def test_all_layers_can_be_asked_for():
    record, _, _ = handmade([9.0, 4.0, 1.0])
    for name in ("taylor", "angular_block", "greedy"):
        assert choose_layers(record, name, 3, "it")[0] == [0, 1, 2]


def test_greedy_that_did_not_go_far_enough_says_how_to_go_on():
    record, _, _ = handmade([9.0, 4.0, 1.0, 3.0], greedy=[2])
    assert choose_layers(record, "greedy", 3, "looked")[0] == [0, 1, 3]
    with pytest.raises(UsageError, match=r"looked did not go that far.*--greedy 2"):
        choose_layers(record, "greedy", 2, "looked")


def test_an_analysis_that_is_not_whole_is_named():
    record, _, _ = handmade([9.0, 4.0])
    del record["angular"]
    with pytest.raises(DataError, match="looked is not a whole analysis"):
        choose_layers(record, "angular_block", 1, "looked")


# --- a given analysis ---


@pytest.mark.parametrize("strategy", [*CRITERIA, "angular_block", "greedy"])
def test_a_given_analysis_decides_without_measuring(recipe, looked, data_folder, tmp_path, measured, strategy):
    asked = recipe({"layers": 3, "strategy": strategy, "analysis": str(looked)})
    wanted = {each["by"]: each["keep"] for each in read_json(looked / "analysis.json")["suggestions"]}[strategy]
    plan = chosen(asked, data_folder, tmp_path)
    assert plan.keep == tuple(parse_indices(wanted, "keep"))
    assert plan.strategy == strategy
    assert plan == plan_of(asked, resolve(asked.source))
    assert not measured
    assert not list(tmp_path.iterdir())


def test_scion_plan_knows_the_number_by_a_given_analysis(recipe, looked, tmp_path, capsys):
    shutil.copytree(looked, tmp_path / "looked")
    record = read_json(looked / "analysis.json")
    for index, layer in enumerate(record["layers"]):
        layer["max_rank"] = 1.0 if index == 4 else 9.0
    write_json(tmp_path / "looked" / "analysis.json", record)
    counts = [
        plan_recipe(recipe(inherit))["num_parameters"]
        for inherit in (
            {"strategy": "potent_prefix", "analysis": str(tmp_path / "looked")}, {"layers": 4}, {"layers": 3},
        )
    ]  # fmt: skip
    assert counts[0] == counts[1] != counts[2]
    assert "until then" not in capsys.readouterr().err
    plan_recipe(recipe({"strategy": "potent_prefix"}))
    assert "until then this is of 2" in capsys.readouterr().err


def test_an_analysis_of_another_model_is_refused(recipe, looked, data_folder, sibling, wide_folder, tmp_path):
    asked = recipe({"layers": 3, "strategy": "taylor", "analysis": str(looked)})
    with pytest.raises(UsageError, match=r"inherit\.analysis: .* of another model"):
        plan_of(asked, open_folder(wide_folder))  # another shape: without its weights
    other = asked.model_copy(update={"source": str(sibling)})
    assert plan_of(other, open_folder(sibling))
    with pytest.raises(UsageError, match=r"inherit\.analysis: .* of another model"):
        run_recipe(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="did not go that far"):
        plan_of(recipe({"layers": 2, "strategy": "greedy", "analysis": str(looked)}), resolve(asked.source))


# --- measuring ---


def test_measured_layers_are_those_that_the_kept_analysis_suggests(recipe, data_folder, tmp_path, measured):
    plan = chosen(recipe({"layers": 3, "strategy": "greedy"}), data_folder, tmp_path)
    record = read_json(tmp_path / "analysis" / "analysis.json")
    suggestions = {each["by"]: parse_indices(each["keep"], "keep") for each in record["suggestions"]}
    assert list(plan.keep) == suggestions["greedy"]
    assert record["data"]["split"] == "train"
    assert {each["name"] for each in record["domains"]} == {"alpha", "beta"}
    del measured[:]
    for strategy in ("removal", "block_influence", "greedy"):  # the same analysis answers them all
        again = chosen(recipe({"layers": 3, "strategy": strategy}), data_folder, tmp_path)
        assert list(again.keep) == suggestions[strategy]
    assert not measured
    chosen(recipe({"layers": 2, "strategy": "greedy"}), data_folder, tmp_path)
    assert set(measured) <= {"greedy_removal", "removal_losses"}
    assert "greedy_removal" in measured


def test_only_the_domains_that_are_trained_on_are_looked_at(recipe, data_folder, tmp_path):
    asked = recipe({"layers": 3, "strategy": "taylor"}, data__mixture={"beta": 1.0})
    chosen(asked, data_folder, tmp_path)
    assert [each["name"] for each in read_json(tmp_path / "analysis/analysis.json")["domains"]] == ["beta"]


def test_nothing_lazy_is_said(recipe, data_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(selection_module, "warn", said.append)
    monkeypatch.setattr("scionlm.recipes.measured.potent_prefix", lambda ranks, tolerance: len(ranks))
    plan = chosen(recipe({"strategy": "potent_prefix"}), data_folder, tmp_path)
    assert plan.keep == (0, 1)
    assert plan.strategy == "potent_prefix:half"
    assert any("no layer is lazy" in text and "first half" in text for text in said)
    said.clear()
    monkeypatch.setattr("scionlm.recipes.measured.potent_prefix", lambda ranks, tolerance: 3)
    plan = chosen(recipe({"strategy": "potent_prefix"}), data_folder, tmp_path)
    assert plan.keep == (0, 1, 2)
    assert not any("no layer is lazy" in text for text in said)


@pytest.mark.parametrize("rule", ["magnitude", "activation", "taylor"])
def test_heads_and_channels_are_the_most_important_ones(recipe, data_folder, tmp_path, measured, rule):
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    asked = recipe({"layers": 3, "importance": rule, **sizes}, data__mixture={"alpha": 1.0})
    source = resolve(asked.source)
    plan = chosen(asked, data_folder, tmp_path)
    assert measured == ([] if rule == "magnitude" else [f"{rule}_scores"])
    shape = ModelShape.of(source.config)
    layers = plan_of(recipe({"layers": 3}), source)
    scores, of_all = (Scorer(source, str(data_folder.path), names).get(rule) for names in (["alpha"], None))
    assert (rule == "magnitude") == all(np.array_equal(scores[name], of_all[name]) for name in scores)
    kept = load_file(tmp_path / f"importance/arrays/{rule}.safetensors")
    assert all(np.array_equal(kept[name], scores[name]) for name in scores)
    wanted = plan_width(layers, family_of(source.config), shape, WidthTarget(**sizes), scores, rule)
    assert plan == wanted
    assert plan != plan_width(layers, family_of(source.config), shape, WidthTarget(**sizes), None, rule)
    standing_in = plan_of(asked, source)
    assert [len(layer.ffn or ()) for layer in standing_in.layers] == [len(layer.ffn or ()) for layer in plan.layers]
    del measured[:]
    assert chosen(asked, data_folder, tmp_path) == plan
    assert not measured


def test_measuring_importance_leaves_the_threads_of_a_run(data_folder, tiny_folder, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before + 1))
    Scorer(open_folder(tiny_folder), str(data_folder.path)).get("activation")
    assert torch.get_num_threads() == before


def test_importance_is_measured_on_every_domain_however_many_there_are(data_folder, tiny_folder, monkeypatch):
    read, original = [], TokenStream.read
    monkeypatch.setattr(TokenStream, "read", lambda self, *at: read.append(self) or original(self, *at))
    monkeypatch.setattr(scores_module, "_TOKENS", 1)
    scorer = Scorer(open_folder(tiny_folder), str(data_folder.path))
    assert all(np.isfinite(scores).all() for scores in scorer.get("activation").values())
    assert len(read) == len(set(map(id, read))) == len(data_folder.domains) == 2


def test_text_that_is_too_short_for_one_window_measures_no_importance(data_folder, tiny_folder, monkeypatch):
    monkeypatch.setattr(scores_module, "_LENGTH", 10**6)
    monkeypatch.setattr(scores_module, "context_length", lambda config: None)
    with pytest.raises(DataError, match=r"no domain has the 1000000 tokens of one window to measure importance on"):
        Scorer(open_folder(tiny_folder), str(data_folder.path)).get("activation")


def test_importance_that_no_gpu_holds_is_measured_on_the_processor(data_folder, tiny_folder, monkeypatch, capsys):
    """With its gradients it takes twice the weights."""
    scorer, again = (Scorer(open_folder(tiny_folder), str(data_folder.path)) for _ in range(2))
    expected = scorer.get("taylor")
    parameters = load_hf_model(open_folder(tiny_folder), torch.float32).num_parameters()
    monkeypatch.setattr(runtime, "start_runtime", lambda precision: runtime.Runtime("cuda", "a GPU", 1, "fp32"))
    monkeypatch.setattr(runtime.Runtime, "memory", lambda self: 6 * parameters)
    found = again.get("taylor")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert f"on the processor: the {8 * parameters:,} bytes" in capsys.readouterr().err


def test_another_rank_takes_the_plan_of_the_main_one(recipe, data_folder, tmp_path, measured, monkeypatch):
    asked = recipe({"layers": 2, "strategy": "taylor", "importance": "activation", "intermediate_size": 20})
    source = resolve(asked.source)
    told = plan_of(recipe({"keep": [1, 4], "intermediate_size": 8}), source)

    class Other(Ranks):
        rank, world = 1, 2

        def on_main(self, work):
            return json.loads(json.dumps(told.to_dict()))

    monkeypatch.setattr(ModelFolder, "weights_fingerprint", lambda self: pytest.fail("the main rank reads the weights"))
    found = selected(asked, source, data_folder, ["alpha"], tmp_path, StopRequest(), Other())
    assert found == told
    assert not measured


def test_hidden_states_are_learned_by_the_layers_that_were_chosen(recipe, looked, tmp_path):
    shutil.copytree(looked, tmp_path / "looked")
    record = read_json(looked / "analysis.json")
    for criterion in record["criteria"]:
        criterion["scores"] = list(range(5))
    write_json(tmp_path / "looked" / "analysis.json", record)
    inherit = {"layers": 2, "strategy": "taylor", "analysis": str(tmp_path / "looked")}
    inputs = open_inputs(recipe(inherit, distill={"hidden": {"layers": "same"}}), tmp_path / "run")
    standing_in = replace(inputs, plan=plan_of(recipe({"layers": 2}), inputs.source), taught_layers={0: 0, 1: 1})
    found = inheritune.with_selection(standing_in, tmp_path / "run", StopRequest(), ALONE)
    assert found.plan.keep == (3, 4)
    assert found.taught_layers == {0: 3, 1: 4}


def test_scores_of_other_weights_are_not_taken(recipe, data_folder, sibling, tmp_path):
    asked = recipe({"layers": 3, "importance": "magnitude", "intermediate_size": 20})
    chosen(asked, data_folder, tmp_path)
    with pytest.raises(UsageError, match="another model"):
        chosen(asked.model_copy(update={"source": str(sibling)}), data_folder, tmp_path)


# --- what is trained is written down ---


def test_a_plan_is_written_down_once_and_not_exchanged(recipe, tmp_path):
    asked = recipe({"layers": 3})
    plan = plan_of(asked, resolve(asked.source))
    assert recorded_plan(tmp_path) is None
    record_plan(plan, tmp_path)
    record_plan(replace(plan, strategy="explicit"), tmp_path)  # the same layers by another name
    assert recorded_plan(tmp_path) == plan
    with pytest.raises(UsageError, match="trains layers 0, 1, 2"):
        record_plan(replace(plan, layers=plan.layers[:2]), tmp_path)
    with pytest.raises(UsageError, match="another folder"):
        record_plan(replace(plan, fresh=("mlp",)), tmp_path)
    assert recorded_plan(tmp_path) == plan


# --- whole runs ---


def test_a_stopped_run_measures_once_and_ends_the_same(recipe, tmp_path, measured, monkeypatch):
    asked = recipe({"layers": 3, "strategy": "removal", "importance": "activation", "intermediate_size": 20})
    run_recipe(asked, tmp_path / "straight")
    once = sorted(measured)
    assert once.count("removal_losses") == once.count("activation_scores") == 1
    del measured[:]
    original = removal.removal_losses

    def stopped(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(removal, "removal_losses", stopped)
        with pytest.raises(StoppedError, match="to go on"):
            run_recipe(asked, out)  # while its source is looked at
    assert "removal_losses" in measured
    assert not (out / "config.yaml").exists()
    with monkeypatch.context() as patch:
        Watch(patch, stop_at=[4])
        with pytest.raises(StoppedError):
            run_recipe(asked, out)  # in the middle of training
    assert measured.count("forward_pass") == 1
    assert measured.count("activation_scores") == 1
    del measured[:]
    run_recipe(asked, out)
    assert not measured
    mine, theirs = outcome(out, asked), outcome(tmp_path / "straight", asked)
    assert mine["weights"] == theirs["weights"]
    assert mine["result"] == theirs["result"]
    assert read_json(out / "surgery.json") == read_json(tmp_path / "straight/surgery.json")
    inherit = read_json(out / "result.json")["inherit"]
    assert inherit["strategy"] == "removal"
    assert CRITERIA["removal"] in inherit["strategy_reason"]
    assert inherit["width"]["importance"] == "activation"


def test_what_was_measured_is_kept_when_the_run_fails_before_it_begins(recipe, tmp_path, measured, monkeypatch):
    asked = recipe({"layers": 3, "strategy": "taylor"})
    with monkeypatch.context() as patch:
        patch.setattr(inheritune, "settle", lambda *_: (_ for _ in ()).throw(DataError("it does not fit")))
        with pytest.raises(DataError, match="does not fit"):
            run_recipe(asked, tmp_path / "run")
        with pytest.raises(DataError, match="does not fit"):
            run_recipe(recipe({"layers": 3}), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert read_json(tmp_path / "run/status.json")["state"] == "failed"
    assert measured
    del measured[:]
    run_recipe(asked, tmp_path / "run")
    assert not measured


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, tiny_folder, data_folder):
    """A run of half the width, with fresh parts and a control: (folder, result, models before training)."""
    out, made = tmp_path_factory.mktemp("narrow") / "run", []
    inherit = {"keep": [0, 2, 2], "repeat": True, "width": "half", "fresh": ["mlp"]}
    make_model = child.make_model

    def spy(setting):
        model = make_model(setting)
        made.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        patch.setattr(child, "make_model", spy)
        asked = recipe_of(tiny_folder, data_folder.path, inherit=inherit, fidelity="paper-text", control=True)
        result = run_recipe(asked, out)
    return out, result, made


def test_the_child_begins_with_its_plan_and_the_control_has_its_shape(narrow, tiny_folder):
    out, result, (heir, control) = narrow
    theirs = load_hf_model(open_folder(tiny_folder)).state_dict()
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(heir[name.format(1)], theirs[name.format(2)][:16, :16])
    assert torch.equal(heir[name.format(1)], heir[name.format(2)])
    assert not torch.equal(
        heir["model.layers.0.mlp.up_proj.weight"], theirs["model.layers.0.mlp.up_proj.weight"][:24, :16]
    )
    assert bool((heir["model.norm.weight"] == 1).all())
    assert {name: tensor.shape for name, tensor in heir.items()} == {n: t.shape for n, t in control.items()}
    assert not torch.equal(heir[name.format(0)], control[name.format(0)])
    plans = [SurgeryPlan.from_dict(read_json(folder / "surgery.json")) for folder in (out, out / "control")]
    assert plans[0] == plans[1]
    assert plans[0].fresh == ("mlp", "final_norm")
    assert result["model"]["hidden_size"] == 16


def test_result_and_card_say_what_was_left_out_and_cut(narrow):
    out, result, _ = narrow
    inherit = result["inherit"]
    assert inherit["keep"] == [0, 2, 2]
    assert inherit["fresh"] == ["mlp", "final_norm"]
    assert inherit["fidelity"] == "paper-text"
    assert inherit["width"] == {
        "importance": "first",
        "sizes": {
            "hidden_size": {"source": 32, "child": 16},
            "intermediate_size": {"source": 48, "child": 24},
            "num_attention_heads": {"source": 4, "child": 2},
            "num_key_value_heads": {"source": 2, "child": 1},
        },
    }
    card = " ".join((out / "model" / "README.md").read_text().split())
    assert "with its embeddings and head; not inherited but initialized anew: mlp and final norm" in card
    assert "`fidelity: paper-text`" in card
    assert "hidden_size 16 of 32" in card
    assert "initialized anew: <bdi>mlp, final_norm</bdi>" in render_report(out)


def test_a_checkpoint_is_exported_by_the_plan_that_was_written_down(narrow, tmp_path, monkeypatch):
    out, _, _ = narrow
    monkeypatch.setattr("scionlm.recipes.export.plan_of", lambda *_: pytest.fail("it is written down"))
    api.export(out, tmp_path / "child")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "child").config.hidden_size == 16
    assert read_json(tmp_path / "child/provenance.json")["plan"]["fresh"] == ["mlp", "final_norm"]


def test_a_run_of_before_is_exported_by_its_recipe(narrow, tmp_path):
    out = shutil.copytree(narrow[0], tmp_path / "run")
    (out / "surgery.json").unlink()
    api.export(out, tmp_path / "child")
    assert read_json(tmp_path / "child/provenance.json")["plan"]["keep"] == [0, 2, 2]


def test_the_card_of_a_plain_run_says_what_it_always_said(earlier):
    card = " ".join((earlier / "model" / "README.md").read_text().split())
    assert "with its embeddings, final norm and head; then trained." in card
    assert "anew" not in card
