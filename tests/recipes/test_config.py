"""The recipe's schema, overrides and presets."""

import pytest
import yaml

from scionlm import api
from scionlm.core.config import parse_yaml, validate
from scionlm.core.errors import UsageError
from scionlm.data import Corpora
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_sweep import load_request
from scionlm.recipes.evaluate import EvaluateOptions, evaluate_model
from scionlm.recipes.presets import load_recipe, preset_corpora, preset_names, preset_text
from scionlm.sources import open_folder
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.request import layer_plan


def test_every_preset_is_a_valid_recipe_with_a_head_comment():
    assert "inheritune-mini" in preset_names()
    for name in preset_names():
        request = load_request(name)
        for recipe in [request] if isinstance(request, Recipe) else [run.recipe for run in request.runs]:
            assert recipe.total_steps > 0
        head = "\n".join(line for line in preset_text(name).splitlines() if line.startswith("#"))
        for word in ("Paper", "Hardware", "Time", "Expected", "Data"):
            assert word in head, (name, word)


def _recipes_of(name):
    request = load_request(name)
    return [request] if isinstance(request, Recipe) else [run.recipe for run in request.runs]


def test_every_preset_of_a_paper_has_a_small_twin_and_its_data():
    whole = [name for name in preset_names() if not name.endswith("-mini")]
    assert len(whole) == 25
    for name in whole:
        assert f"{name}-mini" in preset_names()
        assert all(recipe.data.dir is None for recipe in _recipes_of(f"{name}-mini"))  # runs on what ships
        if "Corpora" in preset_text(name):
            corpora = validate(Corpora, parse_yaml(preset_corpora(name), name), name)
            for recipe in _recipes_of(name):
                mixture = recipe.data.mixture
                assert mixture is None or set(mixture) == set(corpora.domains)
                assert recipe.source is None or recipe.source.partition("@")[0] == corpora.tokenizer
                for reference in _given_references(recipe):
                    assert set(reference) == set(corpora.domains)
        else:
            with pytest.raises(UsageError, match=r"comes with no CORPORA\.yaml"):
                preset_corpora(name)


_SOME_RUNS = {
    "scratch-tinyllama-1.1b-v1.1-mini": {
        "stages": [
            {"name": "basic", "data": {"mixture": {"prose": 1.0}}, "train": {"steps": 6}},
            {"name": "continual", "data": {"ramp": {"start": {"prose": 1.0}, "over": 2}}, "train": {"steps": 3}},
            {"name": "cooldown", "train": {"steps": 1, "global_batch_tokens": 16384}},
        ],
    },
    "inheritune-shootout-mini": {"only": ["first", "stacking"]},
    "shear-shootout-mini": {
        "only": ["masks", "masks-reweight", "scores-steps", "depth-only", "random-init"],
        "reference.train.tokens": 16384,
        "runs.depth-only.train.steps": 6,
        "runs.random-init.train.steps": 6,
    },
}
"""Of a shoot-out those that differ in kind; of stages as few steps."""


def _given_references(recipe):
    """Return the losses in numbers that a recipe compares its domains with, wherever it does."""
    stages = [*recipe.resolved_stages, *([recipe.pruning_stage] if recipe.pruning_stage else [])]
    given = [stage.reweight.reference for stage in stages if stage.reweight]
    return [reference for reference in given if isinstance(reference, dict)]


@pytest.mark.parametrize("name", ["shear-shootout", "shear-shootout-mini"])
def test_every_run_of_the_shearing_shootout_sees_as_many_tokens(name):
    runs = [run.recipe for run in load_request(name).runs[1:]]
    spent = {recipe.total_steps + (recipe.pruning_stage.total_steps if recipe.pruning_stage else 0) for recipe in runs}
    assert len(runs) == 14
    assert len(spent) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in preset_names() if name.endswith("-mini")])
def test_every_small_twin_runs_on_what_ships(name, tmp_path):
    from scionlm import api

    less = {"train.steps": 6, "evaluate.tokens_per_domain": 256, "evaluate.every": 1}
    sizes = {"grow.tokens_per_domain": 512} if "grow" in preset_text(name) and "sweep" not in preset_text(name) else {}
    shear = {"prune.steps": 6} if name.startswith("shear-") else {}
    api.run(name, less | sizes | shear | _SOME_RUNS.get(name, {}), out=tmp_path / "run")
    page = "compare.html" if "recipe: sweep" in preset_text(name) else "report.html"
    assert (tmp_path / "run" / page).stat().st_size > 10_000


def test_the_example_of_the_design_is_valid(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("""
recipe: inheritune
source: HuggingFaceTB/SmolLM2-135M
data:
  dir: data/
  mixture: {prose: 0.7, code: 0.3}
  seq_len: 1024
inherit: {layers: 15, keep: null, init: source}
train:
  tokens: 20_000_000
  global_batch_tokens: 131072
  micro_batch_size: 8
  precision: auto
  compile: auto
optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1, grad_clip: 1.0}
schedule: {name: cosine, warmup: 0.01, min_lr_ratio: 0.1}
distill: null
evaluate: {every: 0.1, tokens_per_domain: 32768, tasks: []}
checkpoint: {every: 10 min, keep: 3}
export: {dtype: source}
seed: 0
""")
    recipe = load_recipe(str(path))
    assert recipe.train.tokens == 20_000_000
    assert recipe.total_steps == 153


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1", "did you mean 'optimizer'"),
        ("optimizer.lrr=1e-3", "did you mean 'lr'"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("train.tokens=0", "train.tokens"),
        ("train.tokens=-5", "train.tokens"),
        ("schedule.warmup=soon", "duration"),
        ("evaluate.every=null", "duration"),
        ("train.time=[1]", "duration"),
        ("data.mixture={prose: 0}", "positive share"),
        ("data.seq_len=300", "not a multiple"),
        ("data.max_epochs=2", "max_epochs and exhausted .* go together"),
        ("data.exhausted=stop", "max_epochs and exhausted .* go together"),
        ("replay={stage: a, run: r}", "stage names data of this run; leave run and data null"),
        ("replay={stage: a, data: d}", "stage names data of this run; leave run and data null"),
        ("replay={run: r, domains: [a]}", "domains is for a folder that stands in"),
        ("replay={stage: a, domains: [a]}", "domains is for a folder that stands in"),
        ("replay={run: r, offset: 0.5}", "offset is for order: offset"),
        ("inherit.init=zero", "inherit.init"),
        ("recipe=inherit", "recipe"),
        ("distill.weight=1.5", r"distill\.weight"),
        ("distill.temperature=0", r"distill\.temperature"),
        ("distill.loss=kl", r"distill\.loss"),
        ("distill.top_k=0", r"distill\.top_k"),
        ("distill.tau=2", "unknown key|did you mean"),
        ("distill.until=10", "schedule linear or cosine"),
        ("distill={schedule: linear, until: 1000000}", r"distill\.until 1000000 is longer than the run"),
        ("distill={schedule: linear, until: 0}", r"distill\.until 0 is less than a step"),
        ("distill.hidden.layers=[]", r"distill\.hidden\.layers"),
        ("distill.hidden.layers=[[0, true]]", r"distill\.hidden\.layers"),
        ("distill={weight: 0.9, schedule: linear, final_ratio: 2}", "beyond 1"),
        ("distill.hidden.layers=other", r"distill\.hidden\.layers"),
        ("train.steps", "KEY=VALUE, as optimizer.lr=3e-4$"),
        ("inherit.init=random", "control"),
    ],
)
def test_a_wrong_setting_is_named(override, words):
    with pytest.raises(UsageError, match=words):
        load_recipe("inheritune-mini", [override])


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("{steps: 3, tokens: 300}", "set either tokens or steps, the other null"),
        ("{method: masks, steps: null, tokens: null}", "masks are learned in training; set prune"),
        ("{method: random, steps: 3}", "method random chooses without training"),
        ("{method: masks, steps: 3, importance: taylor}", "importance is for method scores, not masks"),
        ("{method: masks, steps: 3, iterations: 2}", "iterations is for method scores, not masks"),
        ("{method: scores, steps: 3, train: {steps: 5}}", r"not prune\.train\.steps"),
        ("{method: scores, steps: 3, train: {micro_batch_size: auto}}", "micro_batch_size: auto is for the whole run"),
    ],
)
def test_a_pruning_that_contradicts_itself_is_refused(prune, words):
    given = ["source=x", "data.dir=d", "train.steps=3", "target.num_hidden_layers=2"]
    load_recipe("shear", [*given, "prune={method: scores, steps: 3}"])
    with pytest.raises(UsageError, match=rf"prune.*{words}"):
        load_recipe("shear", [*given, f"prune={prune}"])


@pytest.mark.parametrize(
    ("request_it", "words"),
    [
        (lambda model: evaluate_model("x", "d", EvaluateOptions(precision="fp64")), "precision 'fp64' must be fp32"),
        (lambda model: LedgerReplay(None, 1.0), r"replay\.fraction 1\.0 must be between 0 and 1"),
        (lambda model: LedgerReplay(None, 0.5, offset=1.0), r"replay\.offset 1\.0 below 1"),
        (lambda model: layer_plan({"grow": "stack"}, model, None), "grow needs layers, the number to reach"),
        (lambda model: layer_plan({"grow": "stack", "layers": 7, "keep": [0]}, model, None), "neither keep"),
        (lambda model: layer_plan({"layers": 2, "repeat": True}, model, None), "without keep it means nothing"),
        (lambda model: layer_plan({"layers": 2}, model, model), "a donor is only for grow: source_next"),
        (lambda model: plan_depth(3, 2, strategy="first", scores=[1, 2, 3]), "leave strategy out"),
        (lambda model: plan_depth(3, 4, scores=[1, 2, 3]), "4 cannot be chosen by score; the source has 3 layers"),
        (lambda model: plan_depth(3, 2, scores=[1, 2]), "there are 2 layer scores, but the source has 3 layers"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(request_it, words, tiny_folder):
    with pytest.raises(UsageError, match=words):
        request_it(open_folder(tiny_folder))


def test_a_value_that_the_shell_cut_in_two_is_put_together():
    with pytest.raises(UsageError, match=r"quote both: 'train.time=5 min'$"):
        load_recipe("inheritune-mini", ["train.time=5", "min"])


def test_steps_clears_tokens_and_keep_clears_layers():
    recipe = load_recipe("inheritune-mini", ["train.steps=7", "inherit.keep=0-2,5"])
    assert (recipe.train.steps, recipe.train.tokens, recipe.total_steps) == (7, None, 7)
    assert (recipe.inherit.layers, recipe.inherit.strategy, recipe.inherit.keep) == (None, None, "0-2,5")
    with pytest.raises(UsageError, match="either"):
        load_recipe("inheritune-mini", ["train.steps=7", "train.tokens=7"])


def test_counts_and_durations_are_read():
    recipe = load_recipe("inheritune-mini", ["train.tokens=2M", "schedule.warmup=102_400 tokens", "evaluate.every=5"])
    assert recipe.total_steps == -(-2_000_000 // 1024)
    assert recipe.steps(recipe.schedule.warmup) == 100
    assert recipe.steps(recipe.evaluate.every) == 5


def test_a_bare_recipe_says_what_it_needs():
    with pytest.raises(UsageError, match=r"source, data\.dir"):
        load_recipe("inheritune")
    given = ["source=x", "data.dir=d", "train.steps=3", "inherit.layers=2"]
    assert load_recipe("inheritune", given).optimizer.lr == 3e-4
    with pytest.raises(UsageError, match="did you mean 'inheritune'"):
        load_recipe("inheritun")


@pytest.mark.parametrize("name", ["inheritune", "shear", "continual", "scratch"])
def test_what_a_bare_recipe_proposes_is_a_recipe(name):
    with pytest.raises(UsageError, match="for example: ") as caught:
        load_recipe(name)
    proposed = str(caught.value).partition("for example: ")[2].split()
    assert load_recipe(name, proposed).recipe == name


def test_a_misspelt_key_is_told_before_what_a_bare_recipe_lacks():
    given = ["source=x", "data.dir=d", "train.tokens=8k", "inherit.layer=1"]
    with pytest.raises(UsageError, match=r"^recipe inheritune: unknown key 'inherit\.layer'; did you mean 'layers'\?$"):
        load_recipe("inheritune", given)
    with pytest.raises(UsageError, match=r"unknown key 'sorce'; did you mean 'source'\?$"):
        load_recipe("inheritune", {"sorce": "x"})


def test_an_empty_data_folder_is_not_the_demos_text():
    for overrides in (["data.dir="], [" data.dir = "], ["data.dir=''"], {"data.dir": ""}, {"data.dir": " "}):
        with pytest.raises(UsageError, match=r"data\.dir:? is empty; name a folder"):
            load_recipe("inheritune-mini", overrides)
    assert load_recipe("inheritune-mini", ["data.dir=null"]).data.dir is None


def test_the_same_settings_from_python_and_from_the_command_line():
    texts = ["optimizer.lr=2e-3", "data.mixture={prose: 1.0}", "train.steps=3"]
    values = {"optimizer.lr": 2e-3, "data.mixture": {"prose": 1.0}, "train.steps": 3}
    assert load_recipe("inheritune-mini", texts) == load_recipe("inheritune-mini", values)


def test_a_dumped_recipe_reads_back_equal():
    recipe = load_recipe("inheritune-mini")
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize("way", [{"target.parameters": "60M"}, {"target.shape": "smollm2-135m"}])
def test_another_way_to_say_a_target_clears_the_one_before(way):
    for name in ("shear-mini", "shear-llama2-7b-1.3b"):
        for overrides in (way, [f"{key}={value}" for key, value in way.items()]):
            target = load_recipe(name, overrides).target
            ((key, value),) = [(key, value) for key, value in target.model_dump().items() if value is not None]
            assert f"target.{key}" in way
            assert value in (60_000_000, "smollm2-135m")
    kept = load_recipe("shear-mini", ["target.shape=null", "target.hidden_size=288"]).target
    assert (kept.hidden_size, kept.num_hidden_layers) == (288, 24)


def test_loading_a_preset_twice_does_not_share_state():
    load_recipe("inheritune-mini", {"train.steps": 3})
    assert load_recipe("inheritune-mini").train.tokens is not None
    load_recipe("inheritune", {"source": "a", "data.dir": "b", "train.steps": 3, "inherit.layers": 1})
    with pytest.raises(UsageError):
        load_recipe("inheritune")


def test_a_batch_of_no_whole_sequences_is_named_with_both_numbers():
    with pytest.raises(UsageError, match=r"train\.global_batch_tokens 1000 is not a multiple of data\.seq_len 256$"):
        load_recipe("inheritune-mini", ["train.global_batch_tokens=1000"])


def test_a_branch_may_be_given_whole_or_by_parts():
    base = {"data.dir": "d", "train.steps": 3}
    whole = load_recipe("continual", base | {"branch": {"run": "r", "step": 2}})
    parts = load_recipe("continual", ["data.dir=d", "train.steps=3", "branch.run=r", "branch.step=2"])
    assert whole == parts
    assert whole.source == "r/model"


@pytest.mark.parametrize("place", ["r", "r/checkpoints/step-00000003", "r/checkpoints/step-00000003/"])
def test_the_source_of_a_branch_is_its_runs_model(place):
    recipe = load_recipe("continual", {"data.dir": "d", "train.steps": 3, "branch.run": place})
    assert recipe.source == "r/model"


def test_keys_of_a_pruning_without_a_budget_are_checked_too():
    asked = ["source=x", "data.dir=d", "target.num_hidden_layers=2", "train.steps=3", "prune.method=scores"]
    assert load_recipe("shear", asked).pruning_stage is None
    for wrong, meant in (("prune.optimizer.lrr=1", "lr"), ("prune.train.tokns=1", "tokens")):
        with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
            load_recipe("shear", [*asked, wrong])


def test_a_plan_refuses_a_misspelt_key_of_a_model():
    sizes = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    with pytest.raises(UsageError, match=r"model\.num_key_value_head is no setting of llama; did you mean"):
        api.plan("scratch", {"data.dir": "d", "train.steps": 3, "model": sizes | {"num_key_value_head": 1}})
    assert api.plan("scratch", {"data.dir": "d", "train.steps": 3, "model": sizes})["num_steps"] == 3
