"""Advice in a plan: each rule speaks where a recipe goes against it, and is silent where it does not."""

import pytest

from scionlm import api
from scionlm.core.config import dump_yaml, validate
from scionlm.core.errors import UsageError
from scionlm.recipes.advice import advice
from scionlm.recipes.advice_continual import continual_advice, pretraining_peak
from scionlm.recipes.config import Recipe
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.presets import load_recipe, override_recipe

PEAK = 3e-3
SOUND = {
    "recipe": "continual",
    "data": {"dir": "d", "mixture": {"new": 1.0}},
    "train": {"steps": 100, "global_batch_tokens": 1024},
    "optimizer": {"lr": PEAK},
    "replay": {"domains": ["old"], "fraction": 0.05},
    "upstream": {"domains": ["old"]},
}
SCRATCH = {
    "recipe": "scratch", "model": {"model_type": "llama"}, "data": {"dir": "d"}, "train": {"steps": 100},
    "optimizer": {"lr": PEAK},
}  # fmt: skip


def finished_run(folder, **changes):
    """Write what advice reads of a run that has ended; return where its model would be."""
    folder.mkdir()
    recipe = validate(Recipe, SCRATCH | changes, "given")
    (folder / "config.yaml").write_text(dump_yaml(recipe.model_dump(mode="json")))
    return folder / "model"


@pytest.fixture
def sound(tmp_path):
    """A recipe that goes against nothing."""
    return SOUND | {"source": str(finished_run(tmp_path / "run"))}


def said(config):
    return continual_advice(validate(Recipe, config, "given"))


def stages(*names, **keys):
    return [{"name": name, "data": {"mixture": {name: 1.0}}} | keys for name in names]


FLAT = {"name": "constant", "warmup": 0}
AGAINST = {
    "a high peak": ({"optimizer": {"lr": 6e-3}}, "the peak is 2 times that of the source's pre-training (0.003)",
                    "optimizer.lr=0.003"),
    "a low peak": ({"optimizer": {"lr": 3e-4}}, "the peak is 0.1 times", "optimizer.lr=0.003"),
    "a low peak of the first stage": ({"stages": [{"name": "a", "optimizer": {"lr": 1e-3}}]}, "the peak is 0.33 times",
                                      "optimizer.lr=0.003"),
    "no upstream": ({"upstream": None, "replay": None}, "nothing says what the model knew before",
                    "upstream.dir=FOLDER"),
    "no replay": ({"replay": None}, "nothing is replayed", "replay.run=RUN"),
    "a replay of nothing": ({"replay": {"domains": ["old"], "fraction": 0}}, "nothing is replayed",
                            "replay.fraction=0.05"),
    "no warm-up": ({"schedule": {"warmup": 0}}, "there is no warm-up", "schedule.warmup=0.01"),
    "a warm-up of less than a step": ({"train": {"steps": 9}}, "there is no warm-up", "schedule.warmup=0.01"),
    "one rate": ({"schedule": FLAT}, "the learning rate stays the same", None),
    "domains in turn": ({"stages": stages("a", "b")}, "domains come one after the other", "stages=[]"),
    "rewarming in each stage": ({"stages": [{"name": "a"}, {"name": "b"}]}, "every stage decays its learning rate",
                                None),
    "an early checkpoint": ({"branch": {"run": "r", "step": 3}}, "the run begins with step 3 of r", None),
}  # fmt: skip
NOT_AGAINST = {
    "a peak that is a little higher": {"optimizer": {"lr": 4e-3}},
    "half the peak": {"optimizer": {"lr": 1.5e-3}},
    "replay as upstream": {"upstream": None},
    "upstream elsewhere": {"upstream": {"dir": "elsewhere"}},
    "replay in one stage": {"replay": None, "stages": [{"name": "a", "replay": {"domains": ["old"]}}]},
    "a warm-up of steps": {"schedule": {"warmup": 1}},
    "no rise to make": {"schedule": {"warmup": 0, "start_lr_ratio": 1.0}},
    "domains mixed": {"data": {"dir": "d", "mixture": {"new": 0.5, "newer": 0.5}}},
    "a branch off the end": {"branch": {"run": "r"}},
    "a trunk that keeps its rate": {
        "stages": [{"name": "a", "schedule": {"name": "infinite", "decay": 0}}, {"name": "b", "schedule": FLAT}],
    },
    "one domain in several stages": {
        "stages": [{"name": "a", "schedule": {"name": "wsd", "decay": 0}}, {"name": "b", "schedule": FLAT}],
    },
}  # fmt: skip


def test_a_sound_recipe_is_not_advised(sound):
    assert said(sound) == []


@pytest.mark.parametrize("case", AGAINST)
def test_a_recipe_that_goes_against_a_rule_is_told_what_and_how(sound, case):
    changes, what, override = AGAINST[case]
    found = [one for one in said(sound | changes) if what in one["what"]]
    assert len(found) == 1
    assert found[0]["set"] == override
    assert found[0]["why"]


@pytest.mark.parametrize("case", NOT_AGAINST)
def test_a_rule_is_silent_where_it_is_kept(sound, case):
    assert said(sound | NOT_AGAINST[case]) == []


@pytest.mark.parametrize("case", [case for case, (_, _, override) in AGAINST.items() if override])
def test_who_does_what_is_advised_is_not_advised_again(sound, case):
    changes, what, override = AGAINST[case]
    if case in ("a low peak of the first stage", "a warm-up of less than a step"):
        pytest.skip("a stage has a rate of its own, and a share of so few steps is nothing")
    recipe = validate(Recipe, override_recipe(sound | changes, [override]), "given")
    assert all(what not in one["what"] for one in continual_advice(recipe))


# The peak of the source's pre-training.


def test_the_peak_is_that_of_the_run_that_made_the_source(tmp_path, sound):
    assert pretraining_peak(validate(Recipe, sound, "given")) == PEAK
    rates = [{"name": "a", "optimizer": {"lr": 1e-3}}, {"name": "b", "optimizer": {"lr": 5e-3}}, {"name": "c"}]
    model = finished_run(tmp_path / "staged", stages=rates)
    assert pretraining_peak(validate(Recipe, sound | {"source": str(model)}, "given")) == 5e-3, "the highest of all"
    branch = {key: value for key, value in sound.items() if key != "source"} | {
        "branch": {"run": str(tmp_path / "staged")}
    }
    assert pretraining_peak(validate(Recipe, branch, "given")) == 5e-3


@pytest.mark.parametrize("text", [None, "recipe: [", "recipe: sweep\n", "- 1\n", "recipe: continual\nwhat: 3\n"])
def test_a_peak_that_nobody_knows_is_said_not_to_be_known(tmp_path, sound, text):
    model = tmp_path / "another" / "model"
    model.mkdir(parents=True)
    if text is not None:
        (model.parent / "config.yaml").write_text(text)
    (one,) = said(sound | {"source": str(model)})
    assert one["what"] == "the peak learning rate of the source's pre-training is not known here"
    assert one["set"] is None


def test_a_low_constant_rate_is_told_of_once(sound):
    """It is what papers do to forget least: advice is about what it leaves out, not about its height."""
    (one,) = said(sound | {"optimizer": {"lr": 3e-4}, "schedule": {"name": "constant", "warmup": 0}})
    assert one["what"] == "the learning rate stays the same"


def test_what_is_advised_of_replay_can_be_carried_out_as_it_stands(sound):
    with pytest.raises(UsageError, match=r"replay: set run"):
        validate(Recipe, override_recipe(sound | {"replay": None}, ["replay.fraction=0.05"]), "given")
    recipe = validate(Recipe, override_recipe(sound | {"replay": None}, ["replay.run=RUN"]), "given")
    assert recipe.replay is not None
    assert recipe.replay.fraction == 0.05


# What every recipe may be told.

WIDE = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 8,
        "num_attention_heads": 2}  # fmt: skip
CHILD = {
    "recipe": "inheritune", "source": "s", "data": {"dir": "d"}, "train": {"steps": 100},
    "inherit": {"layers": 4, "strategy": "spaced"}, "distill": {"teacher": "source"}, "optimizer": {"lr": 3e-4},
}  # fmt: skip
PLANNED = {"num_parameters": 500, "source_parameters": 1000, "num_tokens": 5000, "epochs": {"a": 3.9},
           "seconds_by_part": {"training": 9.0, "teacher": 3.0, "evaluation": 11.0}}  # fmt: skip
GENERAL = {
    "many epochs": ({}, {"epochs": {"a": 3.0, "b": 4.5}}, "again and again: b 4.5 times"),
    "the first layers": ({"inherit": {"layers": 4}}, {}, "the first layers are kept"),
    "no teacher": ({"distill": None}, {}, "the source is not used as a teacher"),
    "few tokens": ({}, {"num_tokens": 200}, "50 % of the source's parameters are kept, and trained on 0.4 tokens each"),
    "few tokens for a deep cut": ({}, {"source_parameters": 2000, "num_tokens": 2000}, "25 % of the source's"),
    "a high rate": ({"optimizer": {"lr": 2e-3}}, {}, "the peak learning rate is 0.002"),
    "layers that are measured": (
        {"inherit": {"layers": 4, "strategy": "greedy"}},
        {},
        "the time of measuring layers for greedy is not in this",
    ),
    "tasks at the end": ({"evaluate": {"tasks": ["offline"]}}, {}, "the time of evaluate.tasks is not in this plan"),
    "long evaluations": ({}, {"seconds_by_part": {"training": 1.0, "evaluation": 3.0}}, "held-out losses take 75 %"),
    "a low rate": ({"optimizer": {"lr": 1e-5}}, {}, "the peak learning rate is 1e-05"),
}


def told(changes, planned, config=WIDE):
    return [one["what"] for one in advice(validate(Recipe, CHILD | changes, "given"), config, PLANNED | planned)]


@pytest.mark.parametrize("case", GENERAL)
def test_each_general_rule_speaks_alone(case):
    changes, planned, what = GENERAL[case]
    (one,) = told(changes, planned)
    assert what in one


@pytest.mark.parametrize(
    ("mixture", "stages", "override"),
    [
        ({"alpha": 1.0}, [], "train.tokens="),  # nothing takes its place
        ({"alpha": 0.9, "beta": 0.1}, [], "data.max_epochs=4 data.exhausted=redistribute"),
        ({"alpha": 1.0}, [{"name": "a", "train": {"steps": 400}}], None),  # a budget of its own
    ],
)
def test_too_little_text_is_told_what_can_be_run(tiny_folder, data_folder, mixture, stages, override, capsys):
    """What is advised is planned without a refusal, and is enough."""
    settings = {"source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": mixture,
                "data.seq_len": 24, "inherit.layers": 3, "train.global_batch_tokens": 96, "train.steps": 400,
                "stages": stages}  # fmt: skip
    found = api.plan("inheritune", settings)
    (one,) = [one for one in found["advice"] if "again and again" in one["what"]]
    if override is None:
        assert one["set"] is None
        return
    assert one["set"].startswith(override)
    recipe = override_recipe(load_recipe("inheritune", settings).model_dump(mode="json"), one["set"].split())
    followed = plan_recipe(validate(Recipe, recipe, "given"))
    assert "refused" not in capsys.readouterr().err
    assert all("again and again" not in more["what"] for more in followed["advice"]) or "redistribute" in override
    if "tokens" in override:
        assert 3.5 < followed["epochs"]["alpha"] <= 4


def test_a_plan_says_that_its_run_would_be_refused(tiny_folder, data_folder, capsys):
    settings = {"source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": {"alpha": 1.0},
                "data.seq_len": 24, "inherit.layers": 3, "train.global_batch_tokens": 96}  # fmt: skip
    limits = {"data.max_epochs": 4, "data.exhausted": "redistribute"}
    refused = "warning: a run would be refused: stage main wants 1,600 windows by its end"
    assert api.plan("inheritune", settings | limits | {"train.steps": 400})["epochs"]["alpha"] > 4
    assert refused in capsys.readouterr().err
    assert api.plan("inheritune", settings | limits | {"train.steps": 10})["epochs"]["alpha"] < 4
    assert api.plan("inheritune", settings | limits | {"train.time": "1000 hours"})["num_steps"] > 400
    assert "refused" not in capsys.readouterr().err  # steps of a time are known when the run begins
    branch = {"source": str(tiny_folder), "data.dir": str(data_folder.path), "branch.run": "runs/trunk"}
    api.plan("continual", branch | {"data.seq_len": 24, "train.steps": 10, "train.global_batch_tokens": 96})
    assert "warning: a run would be refused: branch.run: runs/trunk is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("upstream", "override"),
    [({"dir": "elsewhere"}, "replay.data=elsewhere"), ({"domains": ["old"]}, "replay.domains=[old]"),
     ({}, "replay.run=RUN"), (None, "replay.run=RUN")],
)  # fmt: skip
def test_what_stands_in_for_unknown_text_is_what_is_measured_of_it(sound, upstream, override):
    config = sound | {"source": "org/model", "upstream": upstream, "replay": None}
    (one,) = [one for one in said(config) if "nothing is replayed" in one["what"]]
    assert one["set"] == override
    recipe = validate(Recipe, override_recipe(config, [override]), "given")
    assert all("nothing is replayed" not in more["what"] for more in continual_advice(recipe))


@pytest.mark.parametrize(("every", "override"), [(10, "evaluate.every=0.5"), (0.5, None), (0, None)])
def test_long_evaluations_are_told_how_to_be_fewer_where_they_can_be(every, override):
    recipe = validate(Recipe, CHILD | {"evaluate": {"every": every}}, "given")
    (one,) = advice(recipe, WIDE, PLANNED | {"seconds_by_part": {"training": 1.0, "evaluation": 3.0}})
    assert one["set"] == override
    assert ("every 10 of 100 steps" in one["why"]) == (every == 10)


@pytest.mark.parametrize(
    ("changes", "planned", "config"),
    [
        ({}, {}, WIDE),
        ({"optimizer": {"lr": 2e-3}}, {}, WIDE | {"hidden_size": 512}),  # narrow models take more
        ({"optimizer": {"lr": 2e-2, "name": "muon"}}, {}, WIDE),  # whose rates are others
        ({"inherit": {"layers": 4, "init": "random"}}, {}, WIDE),
        ({"inherit": {"layers": 4}}, {"num_parameters": 1000}, WIDE),  # nothing is cut
        ({"inherit": {"keep": "0-3"}}, {}, WIDE),
    ],
)
def test_a_general_rule_is_silent_where_it_does_not_hold(changes, planned, config):
    assert told(changes, planned, config) == []


def test_tokens_are_those_of_the_childs_own_weights():
    def words(base, **more):
        recipe = validate(Recipe, CHILD | {"grow": {"from": base, "by": 1}}, "given")
        parts = {"reference": 9000, "round 1 (4 layers)": 100, "round 2 (5 layers)": 120, "control": 9000} | more
        rounds = [{"name": name, "num_tokens": tokens} for name, tokens in parts.items()]
        found = advice(recipe, WIDE, PLANNED | {"rounds": rounds, "num_tokens": 18_220})
        return [one["what"] for one in found]

    assert words("source") == ["50 % of the source's parameters are kept, and trained on 0.24 tokens each"]
    assert words("student") == ["50 % of the source's parameters are kept, and trained on 0.44 tokens each"]
