"""Stages: what a recipe's stages resolve to, what they train on, and that dividing a run changes nothing by itself."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import corpora_file, text
from scionlm.core.config import dump_yaml, parse_yaml, validate
from scionlm.core.errors import DataError, StoppedError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.data.mixing.plan import REPLAYED
from scionlm.data.mixing.windows import IGNORE
from scionlm.recipes import order as order_module
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.order import sampling_of
from scionlm.recipes.run import run_recipe
from whole_runs import SEQ_LEN, Watch, column, consumed_of, quicken, recipe_of, weights_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def make(tiny_folder, data_folder):
    """Return a recipe of the shared source and data."""
    return lambda **changes: recipe_of(tiny_folder, data_folder.path, **changes)


def small_data(root, tokenizer, words=45, base=0, documents=12) -> DataFolder:
    """Return a data folder with a few windows a domain, of texts of its own."""
    path = corpora_file(root, tokenizer, num_documents=documents, words=words)
    if base:
        for name, first in (("alpha", base), ("beta", base + 4000)):
            lines = [json.dumps({"text": text(first + i, words)}) for i in range(documents)]
            (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    prepare(load_corpora(path), root, root / "data")
    return DataFolder(root / "data")


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_folder) -> DataFolder:
    return small_data(tmp_path_factory.mktemp("few"), tiny_folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_folder) -> DataFolder:
    """Other text under the same names of domains."""
    return small_data(tmp_path_factory.mktemp("other"), tiny_folder, base=20_000)


def two(**second) -> list[dict]:
    return [{"name": "a"}, {"name": "b"} | second]


# What stages resolve to.


def test_a_recipe_without_stages_has_one_called_main(make):
    (stage,) = make().resolved_stages
    assert stage.name == "main"
    assert (stage.total_steps, stage.data.seq_len, stage.optimizer_state) == (8, SEQ_LEN, "keep")


def test_what_a_stage_leaves_unset_comes_from_the_top_level(make):
    recipe = make(
        optimizer__weight_decay=0.3,
        schedule={"name": "linear", "warmup": 2, "min_lr_ratio": 0.2},
        optimizer_state="reset",
        stages=[
            {"name": "a"},
            {"name": "b", "optimizer": {"lr": 1e-4}, "data": {"mixture": {"beta": 1.0}}, "schedule": {"warmup": 1},
             "train": {"micro_batch_size": 3}, "optimizer_state": "keep"},
        ],
    )  # fmt: skip
    a, b = recipe.resolved_stages
    top = (recipe.data, recipe.optimizer, recipe.schedule, recipe.train, recipe.optimizer_state)
    assert (a.data, a.optimizer, a.schedule, a.train, a.optimizer_state) == top
    assert (b.optimizer.lr, b.optimizer.weight_decay, a.optimizer.lr) == (1e-4, 0.3, 3e-3)
    assert (b.data.mixture, b.data.seq_len, b.data.dir) == ({"beta": 1.0}, SEQ_LEN, recipe.data.dir)
    assert (b.schedule.name, b.schedule.warmup, b.schedule.min_lr_ratio) == ("linear", 1, 0.2)
    assert (b.train.micro_batch_size, b.train.steps, b.optimizer_state) == (3, 8, "keep")


def test_a_stages_own_budget_clears_the_other_unit_of_the_top_level(make):
    recipe = make(train__steps=None, train__tokens=96 * 5, stages=[{"name": "a", "train": {"steps": 3}}, {"name": "b"}])
    a, b = recipe.resolved_stages
    assert (a.train.steps, a.train.tokens, a.total_steps, b.total_steps) == (3, None, 3, 5)
    assert (recipe.total_steps, recipe.total_tokens) == (8, 8 * 96)
    (c,) = make(stages=[{"name": "c", "train": {"tokens": 97}}]).resolved_stages
    assert (c.train.steps, c.total_steps) == (None, 2)


def test_batches_and_lengths_of_stages_add_up(make):
    recipe = make(
        stages=[
            {"name": "a", "train": {"steps": 2}},
            {"name": "b", "train": {"steps": 3, "global_batch_tokens": 12 * 6}, "data": {"seq_len": 12}},
        ]
    )
    assert [stage.sequences_per_step for stage in recipe.resolved_stages] == [4, 6]
    assert recipe.total_tokens == 2 * 96 + 3 * 72


def test_an_explicit_null_takes_replay_and_reweighting_away(make, data_folder):
    replay = {"data": str(data_folder.path), "fraction": 0.25}
    stages = [
        {"name": "a"},
        {"name": "b", "replay": None, "reweight": None},
        {"name": "c", "replay": {"fraction": 0.5}},
    ]
    a, b, c = make(replay=replay, reweight={"every": 2}, stages=stages).resolved_stages
    assert (a.replay.fraction, a.reweight.every) == (0.25, 2)
    assert (b.replay, b.reweight) == (None, None)
    assert (c.replay.fraction, c.replay.data, c.reweight.every) == (0.5, replay["data"], 2)


def test_a_stage_that_replays_another_stage_leaves_the_top_levels_run_behind(make):
    replay = {"run": "somewhere", "data": "there", "fraction": 0.25}
    a, b = make(replay=replay, stages=[{"name": "a"}, {"name": "b", "replay": {"stage": "a"}}]).resolved_stages
    assert (a.replay.run, a.replay.stage) == ("somewhere", None)
    assert (b.replay.run, b.replay.data, b.replay.stage, b.replay.fraction) == (None, None, "a", 0.25)


SCHEDULES = [
    {"name": "constant"}, {"name": "linear"}, {"name": "cosine"}, {"name": "one_minus_sqrt"}, {"name": "exponential"},
    {"name": "inverse_sqrt", "timescale": 3.0}, {"name": "wsd", "decay": 2, "decay_shape": "cosine"},
    {"name": "wsd", "decay": 2, "decay_shape": "exponential", "half_life": 2}, {"name": "neox_cosine"},
    {"name": "infinite", "decay": 2, "cooldown": 3, "constant_lr_ratio": 0.4}, {"warmup": 3}, {"start_lr_ratio": 0.5},
    {},
]  # fmt: skip
PARTS = {
    "schedule": st.sampled_from(SCHEDULES),
    "data": st.sampled_from([{"mixture": {"beta": 1.0}}, {"seq_len": 12}, {"temperature": 2.0, "mixture": None},
                             {"max_epochs": 3.0, "exhausted": "redistribute"}, {"document_mask": True}]),
    "train": st.sampled_from([{"steps": 7}, {"tokens": 960}, {"micro_batch_size": 3}]),
    "optimizer": st.sampled_from([{"lr": 1e-3}, {"betas": [0.8, 0.9]}, {"grad_clip": 0.0}]),
    "replay": st.sampled_from([None, {"data": "d", "fraction": 0.5}, {"run": "r"}]),
    "reweight": st.sampled_from([None, {"rule": "doremi"}]),
    "optimizer_state": st.sampled_from(["keep", "reset", "moments"]),
}  # fmt: skip
TOP = {
    "schedule": st.sampled_from(SCHEDULES),
    "replay": st.sampled_from([None, {"data": "d", "fraction": 0.25}, {"run": "r", "data": "d"}]),
    "reweight": st.sampled_from([None, {"every": 3}]),
    "optimizer_state": st.sampled_from(["keep", "reset", "moments"]),
}


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=TOP), st.fixed_dictionaries({}, optional=PARTS))
def test_a_recipe_that_was_written_down_has_the_same_stages(top, part):
    """config.yaml says everything: what was left unset and what was taken away must not become the same in it."""
    given_ = {
        "recipe": "inheritune", "source": "s", "inherit": {"layers": 2},
        "stages": [{"name": "a"} | part, {"name": "b"}],
        "data": {"dir": "d", "seq_len": SEQ_LEN}, "train": {"steps": 8, "global_batch_tokens": 96},
    } | top  # fmt: skip
    try:
        recipe = validate(Recipe, given_, "given")
    except UsageError:
        return
    again = validate(Recipe, parse_yaml(dump_yaml(recipe.model_dump(mode="json")), "config.yaml"), "config.yaml")
    assert again == recipe
    assert again.resolved_stages == recipe.resolved_stages
    thrice = validate(Recipe, parse_yaml(dump_yaml(again.model_dump(mode="json")), "config.yaml"), "config.yaml")
    assert thrice.resolved_stages == recipe.resolved_stages


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"name": "warm", "data": {"seqlen": 3}}],
            r"stage 'warm', data: unknown key 'seqlen'; did you mean 'seq_len'",
        ),
        ([{"name": "warm", "optimizer": {"learning_rate": 3}}], r"stage 'warm', optimizer: unknown key"),
        ([{"name": "warm", "shedule": {}}], r"stages.*shedule'; did you mean 'schedule'"),
        ([{"name": "a"}, {"name": "a"}], "stage 'a': another stage has this name"),
        ([{"name": "a/b"}], "name"),
        ([{"name": "a", "train": {"steps": 1, "tokens": 96}}], "stage 'a', train: set .* null"),
        ([{"name": "a", "train": {"steps": 0}}], "stage 'a', train: steps"),
        ([{"name": "a", "data": {"seq_len": 7}}], "stage 'a': train.global_batch_tokens 96 is not a multiple"),
        ([{"name": "late", "replay": {"stage": "basis"}}, {"name": "basis"}], "'late': replay.stage 'basis' is no"),
        ([{"name": "a", "replay": {"stage": "a"}}], "stage 'a': replay.stage 'a' is no earlier stage"),
        ([{"name": "basis"}, {"name": "b", "replay": {"stage": "basic"}}], "'basic' is no.*did you mean 'basis'"),
        (two(data={"seq_len": 12}, replay={"stage": "a"}), "stage 'b'.*seq_len"),
        (two(optimizer={"name": "muon"}), "stage 'b': another optimizer.*reset"),
        (two(optimizer={"name": "muon"}, optimizer_state="moments"), "stage 'b': another optimizer.*reset"),
        ([{"name": "a", "train": {"precision": "bf16"}}], "stage 'a': train.precision is for the whole run"),
        ([{"name": "a", "train": {"compile": False}}], "stage 'a': train.compile is for the whole run"),
        ([{"name": "a", "train": {"skip_nonfinite": 0}}], "stage 'a': train.skip_nonfinite is for the whole run"),
        (two(schedule={"name": "wsd", "warmup": 5, "decay": 5}), "stage 'b': schedule wsd: its parts are longer"),
        (two(schedule={"name": "infinite", "decay": 5}), "stage 'b': schedule infinite: its parts are longer"),
        (two(schedule={"warmup": 9}), "stage 'b': schedule.warmup 9 is longer"),
        ([{"name": "a", "schedule": {"name": "cosine", "decay": 3}}], "stage 'a', schedule: decay is for"),
        (two(schedule={"name": "exponential", "min_lr_ratio": 0.0}), "stage 'b': schedule exponential: .*never"),
        (two(reweight={}, data={"ramp": {"start": {"alpha": 1}, "over": 3}}), "stage 'b': data.ramp and reweight"),
    ],
)
def test_a_wrong_stage_is_named(make, stages, words):
    with pytest.raises(UsageError, match=words):
        make(stages=stages)


def test_a_stage_that_the_top_level_does_not_fit_is_named(make):
    with pytest.raises(UsageError, match=r"stage 'b': set .*train\.tokens"):
        make(train__steps=None, stages=[{"name": "a", "train": {"steps": 3}}, {"name": "b"}])
    with pytest.raises(UsageError, match=r"stage 'b': schedule\.warmup 3 is longer than .* 2 steps"):
        make(schedule__warmup=3, stages=two(train={"steps": 2}))


def test_another_optimizer_with_a_reset_is_welcome(make):
    recipe = make(stages=[{"name": "a"}, {"name": "b", "optimizer": {"name": "muon"}, "optimizer_state": "reset"}])
    assert [stage.optimizer.name for stage in recipe.resolved_stages] == ["adamw", "muon"]


def test_an_unset_budget_at_the_top_is_no_fault_where_every_stage_has_its_own(make):
    assert make(train__steps=None, stages=[{"name": "a", "train": {"steps": 3}}]).total_steps == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": two(data={"mixture": {"alhpa": 1.0}})}, "did you mean 'alpha'"),
        ({"stages": two(data={"dir": "nowhere"})}, "nowhere"),
        ({"stages": two(replay={"stage": "a", "fraction": 0.9}, train={"steps": 9})}, "repeat"),
        ({"stages": [
            {"name": "a", "train": {"steps": 4}},
            {"name": "b", "train": {"steps": 4}, "replay": {"stage": "a", "fraction": 0.5}},
            {"name": "c", "train": {"steps": 8}, "replay": {"stage": "b", "fraction": 0.4}},
        ]}, "replay"),
        ({"branch": {"run": "nowhere"}}, "nowhere"),
    ],
)  # fmt: skip
def test_what_no_later_stage_could_do_is_refused_before_anything_begins(make, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        run_recipe(make(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A run of three stages.

THREE = {
    "optimizer.grad_clip": 0.0,
    "control": True,
    "stages": [
        {"name": "broad", "data": {"mixture": {"alpha": 0.7, "beta": 0.3}}, "train": {"steps": 6},
         "schedule": {"name": "constant", "warmup": 2}},
        {"name": "narrow", "data": {"mixture": {"alpha": 0.2, "beta": 0.8}}, "optimizer": {"lr": 2e-3},
         "train": {"steps": 5, "global_batch_tokens": SEQ_LEN * 7, "micro_batch_size": 3},
         "schedule": {"name": "cosine", "warmup": 1, "min_lr_ratio": 0.2}},
        {"name": "short", "data": {"mixture": {"alpha": 0.6, "beta": 0.4}, "seq_len": 12}, "optimizer": {"lr": 1e-3},
         "train": {"steps": 4, "global_batch_tokens": 12 * 5},
         "schedule": {"name": "wsd", "warmup": 0, "decay": 2, "decay_shape": "linear", "min_lr_ratio": 0.0}},
    ],
}  # fmt: skip
SPANS = {"broad": range(6), "narrow": range(6, 11), "short": range(11, 15)}
RATES = [
    *(3e-3 * min(t / 2, 1) for t in range(1, 7)),
    *(2e-3 * (1 if t == 1 else 0.2 + 0.4 * (1 + math.cos(math.pi * (t - 1) / 4))) for t in range(1, 6)),
    1e-3, 1e-3, 5e-4, 0.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory, tiny_folder, data_folder):
    """A run of three stages with its control: folder, recipe, result, and what was watched of it."""
    out = tmp_path_factory.mktemp("three") / "run"
    changes = {key.replace(".", "__"): value for key, value in THREE.items()}
    recipe = recipe_of(tiny_folder, data_folder.path, evaluate__every=0, **changes)
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        watch = Watch(patch)
        result = run_recipe(recipe, out)
    return out, recipe, result, watch


def test_the_rates_of_each_step_are_those_of_its_stages_schedule(three):
    out, recipe, _, _ = three
    rates = column(out, "optim/lr")
    assert rates == pytest.approx(RATES, abs=1e-12)
    exact = []
    for stage in recipe.resolved_stages:
        schedule = stage.build_schedule()
        exact += [stage.optimizer.lr * schedule(step) for step in range(stage.total_steps)]
    assert rates == exact


def test_steps_and_tokens_go_on_from_stage_to_stage(three):
    out, recipe, result, watch = three
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "train/nll_nats" in line]
    assert [line["step"] for line in lines] == list(range(1, 16))
    predicted = [int((batch.labels != IGNORE).sum()) for batch in watch.batches[:15]]
    assert [line["tokens"] for line in lines] == np.cumsum(predicted).tolist()
    assert predicted == [96] * 6 + [168] * 5 + [60] * 4, "no window of these has labels that are left out"
    assert result["training"]["steps"] == recipe.total_steps == 15
    assert result["training"]["tokens"] == recipe.total_tokens == sum(predicted)


def test_each_stage_trains_on_batches_of_its_own_shape(three):
    shapes = [batch.input_ids.shape for batch in three[3].batches[:15]]
    assert shapes == [(4, 24)] * 6 + [(7, 24)] * 5 + [(5, 12)] * 4


def test_every_boundary_of_stages_is_evaluated_once(three):
    out = three[0]
    evaluated = [line["step"] for line in read_jsonl(out / "metrics.jsonl") if "eval/alpha/nll_nats" in line]
    assert evaluated == [0, 6, 11, 15]


def test_the_checkpoint_at_the_end_of_each_stage_stays_for_good(three):
    folders = sorted((three[0] / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000006", "step-00000011", "step-00000015"]
    for number, folder in enumerate(folders):
        assert read_json(folder / "manifest.json")["for_good"] is True
        state = read_json(folder / "state.json")
        assert state["stage"] == number
        assert state["lr_now"] == pytest.approx([3e-3, 4e-4, 0.0][number])
        assert sum(piece["steps"] for piece in state["schedule"]) == (6, 5, 4)[number]


def test_the_mixture_of_each_stage_is_exact_to_one_sequence_at_every_moment(three):
    _, recipe, _, watch = three
    for stage in recipe.resolved_stages:
        samples = [sample for step in SPANS[stage.name] for sample in watch.samples[step]]
        counts = Counter()
        for number, sample in enumerate(samples, start=1):
            counts[sample.domain] += 1
            for domain, share in stage.data.mixture.items():
                assert abs(counts[domain] - share * number) <= 1
        assert len(samples) == stage.total_steps * stage.sequences_per_step


def test_samples_go_on_over_stages_on_the_same_windows_and_begin_anew_on_others(three):
    _, _, _, watch = three
    drawn = {
        name: [sample for step in span for sample in watch.samples[step]] for name, span in SPANS.items()
    }  # fmt: skip
    for domain in ("alpha", "beta"):
        first, second, third = ([s.draw for s in samples if s.domain == domain] for samples in drawn.values())
        assert first == list(range(len(first)))
        assert second == list(range(len(first), len(first) + len(second)))
        assert third == list(range(len(third))), "another seq_len makes other windows"


def test_the_ledgers_hold_each_stages_own_samples(three):
    out, recipe, _, watch = three
    for name, samples in consumed_of(out, recipe).items():
        assert samples == [tuple(sample) for step in SPANS[name] for sample in watch.samples[step]]


def test_the_control_of_a_run_of_stages_sees_the_same_batches(three):
    out, _, _, watch = three
    rows = watch.rows()
    assert len(rows) == 30
    assert rows[:15] == rows[15:]
    assert rows[0] != rows[1]
    for name in SPANS:
        ledger = out / "stages" / name / "ledger.jsonl"
        assert ledger.read_text() == (out / "control" / "stages" / name / "ledger.jsonl").read_text()
    assert column(out, "train/nll_nats") != column(out / "control", "train/nll_nats")


# Windows over stages.

WHOLE = {"data__mixture": {"alpha": 1.0}, "train__global_batch_tokens": SEQ_LEN}


def epoch_in_stages(few, lengths=(3, 1)):
    """Return stages that together go through the domain alpha once."""
    num_windows = -(-(few.num_tokens("alpha", "train") - 1) // SEQ_LEN)
    steps = [*lengths, num_windows - sum(lengths)]
    return num_windows, [{"name": f"s{i}", "train": {"steps": count}} for i, count in enumerate(steps)]


def test_stages_of_one_epoch_together_see_every_token_once(tiny_folder, few, tmp_path, monkeypatch):
    num_windows, stages = epoch_in_stages(few)
    watch = Watch(monkeypatch)
    run_recipe(recipe_of(tiny_folder, few.path, stages=stages, **WHOLE), tmp_path / "run")
    rows = [row for step in watch.rows() for row in step]
    assert len(set(rows)) == len(rows) == num_windows
    seen = np.sort(np.concatenate([batch.labels[batch.labels != IGNORE] for batch in watch.batches]))
    stream = few.stream("alpha", "train")
    assert (seen == np.sort(stream.read(1, stream.num_tokens - 1))).all()


def test_stages_that_forgot_each_other_would_see_windows_twice(tiny_folder, few, tmp_path, monkeypatch):
    """Negative control of the test above."""
    num_windows, stages = epoch_in_stages(few)
    watch = Watch(monkeypatch)
    monkeypatch.setattr(order_module.Sampling, "going_on", lambda self, cursors: (self, {}))
    run_recipe(recipe_of(tiny_folder, few.path, stages=stages, **WHOLE), tmp_path / "run")
    rows = [row for step in watch.rows() for row in step]
    assert len(set(rows)) < len(rows) == num_windows


@pytest.mark.parametrize("what", ["folder", "copy", "packing"])
def test_only_other_windows_begin_anew(tiny_folder, few, other, tmp_path, monkeypatch, what):
    if what == "copy":  # elsewhere, but the same
        shutil.copytree(few.path, tmp_path / "copy")
    data = {
        "folder": {"dir": str(other.path)}, "copy": {"dir": str(tmp_path / "copy")}, "packing": {"packing": "best_fit"},
    }[what]  # fmt: skip
    watch = Watch(monkeypatch)
    stages = [{"name": "a", "train": {"steps": 4}}, {"name": "b", "train": {"steps": 2}, "data": data},
              {"name": "c", "train": {"steps": 2}}]  # fmt: skip
    run_recipe(recipe_of(tiny_folder, few.path, stages=stages, **WHOLE), tmp_path / "run")
    draws = [sample.draw for step in watch.samples for sample in step]
    assert draws == (list(range(8)) if what == "copy" else [0, 1, 2, 3, 0, 1, 4, 5])


def test_equal_names_in_two_data_folders_are_both_evaluated(tiny_folder, few, other, tmp_path):
    stages = [
        {"name": "a", "train": {"steps": 2}}, {"name": "b", "train": {"steps": 2}, "data": {"dir": str(other.path)}},
        {"name": "c", "train": {"steps": 2}, "data": {"mixture": {"beta": 1.0}}},
    ]  # fmt: skip
    out = tmp_path / "run"
    result = run_recipe(recipe_of(tiny_folder, few.path, stages=stages), out)
    names = {"alpha", "beta", "alpha@b", "beta@b"}
    assert set(result["domains"]) == set(result["before"]) == set(result["source"]["domains"]) == names
    assert len({loss["nll"] for loss in result["domains"].values()}) == 4
    for line in read_jsonl(out / "metrics.jsonl"):
        evaluated = {key.split("/")[1] for key in line if key.startswith("eval/")}
        assert evaluated in (set(), names)
    alone = run_recipe(
        recipe_of(tiny_folder, other.path, stages=[{"name": "x", "train": {"steps": 1}}]), tmp_path / "other"
    )
    assert result["source"]["domains"]["alpha@b"]["nll"] == alone["source"]["domains"]["alpha"]["nll"]


def test_a_later_stage_may_have_domains_of_its_own(tiny_folder, few, tmp_path):
    path = corpora_file(tmp_path, tiny_folder, 12, 45, domains={"gamma": {"paths": ["alpha.jsonl", "beta.jsonl"]}})
    prepare(load_corpora(path), tmp_path, tmp_path / "data")
    gamma = {"dir": str(tmp_path / "data"), "mixture": {"gamma": 1.0}}
    recipe = recipe_of(tiny_folder, few.path, control=True, train__steps=2, stages=two(data=gamma))
    result = run_recipe(recipe, tmp_path / "run")
    assert list(result["domains"]) == list(result["control"]["domains"]) == ["alpha", "beta", "gamma"]
    assert set(result["training"]["epochs"]) == {"alpha", "beta", "gamma"}


def replayed_rows(watch, steps):
    """Return the rows of some steps that were replayed, and what they say they are."""
    return [
        (row, (sample.domain.removeprefix(REPLAYED), sample.draw))
        for step in steps
        for row, sample in zip(watch.rows()[step], watch.samples[step], strict=True)
        if sample.domain.startswith(REPLAYED)
    ]


@pytest.mark.parametrize("order", ["original", "offset", "reshuffled"])
def test_replay_of_an_earlier_stage_gives_exactly_its_samples(make, tmp_path, monkeypatch, order):
    watch = Watch(monkeypatch)
    replay = {"stage": "b", "fraction": 0.25, "order": order} | ({"offset": 0.5} if order == "offset" else {})
    stages = [
        {"name": "a", "train": {"steps": 3}},
        {"name": "b", "train": {"steps": 4}, "data": {"mixture": {"alpha": 0.25, "beta": 0.75}}},
        {"name": "c", "train": {"steps": 12}, "data": {"mixture": {"alpha": 1.0}}, "replay": replay},
    ]
    recipe = make(stages=stages)
    run_recipe(recipe, tmp_path / "run")
    earlier = [
        (row, tuple(sample))
        for step in range(3, 7)
        for row, sample in zip(watch.rows()[step], watch.samples[step], strict=True)
    ]
    replayed = replayed_rows(watch, range(7, 19))
    assert len(replayed) == 12
    if order == "original":
        assert replayed == earlier[:12]
    elif order == "offset":
        assert replayed == earlier[8:] + earlier[:4]
    else:
        assert set(replayed) < set(earlier)
        assert len(set(replayed)) == 12
        assert replayed != earlier[:12]
    own = [tuple(s) for step in range(7, 19) for s in watch.samples[step] if not s.domain.startswith(REPLAYED)]
    assert consumed_of(tmp_path / "run", recipe)["c"] == own


# Dividing a run changes nothing.

CONSTANT = {"name": "constant", "warmup": 2}
NAMES = ("adamw", "muon")


def weights(recipe, out) -> bytes:
    run_recipe(recipe, out)
    return weights_of(out)


@pytest.mark.parametrize("optimizer", NAMES)
def test_two_stages_that_keep_the_state_are_one_run(make, tmp_path, monkeypatch, optimizer):
    watch = Watch(monkeypatch)
    common, half = {"optimizer__name": optimizer}, {"steps": 4}
    whole = weights(make(schedule=CONSTANT, **common), tmp_path / "whole")
    halves = {
        state: weights(
            make(
                schedule={"name": "constant", "warmup": 0}, optimizer_state=state, **common,
                stages=[{"name": "main", "train": half, "schedule": CONSTANT}, {"name": "rest", "train": half}],
            ),
            tmp_path / state,
        )
        for state in ("keep", "reset", "moments")
    }  # fmt: skip
    rows = watch.rows()
    assert rows[:8] == rows[8:16] == rows[16:24] == rows[24:]
    assert halves["keep"] == whole
    assert len({whole, halves["reset"], halves["moments"]}) == 3, "negative control: the state is what makes it so"
    assert column(tmp_path / "keep", "train/nll_nats") == column(tmp_path / "whole", "train/nll_nats")


@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt", "cosine", "exponential"])
def test_a_branch_that_decays_off_a_constant_trunk_is_the_wsd_run(make, tmp_path, monkeypatch, shape):
    wsd = {"name": "wsd", "warmup": 2, "decay": 4, "decay_shape": shape, "min_lr_ratio": 0.1}
    watch = Watch(monkeypatch)
    whole = weights(make(schedule=wsd), tmp_path / "wsd")
    run_recipe(make(schedule=CONSTANT, train__steps=6, checkpoint__every=2), tmp_path / "trunk")
    decay, trunk = {"name": shape, "warmup": 0, "min_lr_ratio": 0.1}, {"run": str(tmp_path / "trunk"), "step": 4}
    branch = {
        state: weights(make(schedule=decay, train__steps=4, optimizer_state=state, branch=trunk), tmp_path / state)
        for state in ("keep", "reset", "moments")
    }  # fmt: skip
    rows = watch.rows()
    assert rows[:6] == rows[8:14]
    assert rows[4:8] == rows[14:18] == rows[18:22] == rows[22:26]
    assert branch["keep"] == whole
    assert len({whole, branch["reset"], branch["moments"]}) == 3
    assert column(tmp_path / "keep", "optim/lr") == column(tmp_path / "wsd", "optim/lr")[4:]
    from_elsewhere = make(schedule=decay, train__steps=4, branch=trunk | {"step": 2})
    assert weights(from_elsewhere, tmp_path / "elsewhere") != whole


@pytest.mark.parametrize("state", ["keep", "reset", "moments"])
def test_a_branch_off_the_end_is_a_second_stage(make, tmp_path, state):
    first = {"name": "linear", "warmup": 1}
    second = {"name": "cosine", "warmup": 2, "start_lr_ratio": 0.5}
    stages = [{"name": "main", "train": {"steps": 4}, "schedule": first},
              {"name": "rest", "train": {"steps": 4}, "schedule": second, "optimizer_state": state}]  # fmt: skip
    whole = weights(make(stages=stages), tmp_path / "whole")
    run_recipe(make(train__steps=4, schedule=first), tmp_path / "trunk")
    branch = {"run": str(tmp_path / "trunk")}
    parted = make(train__steps=4, schedule=second, optimizer_state=state, branch=branch)
    assert weights(parted, tmp_path / "branch") == whole
    folder = next((tmp_path / "trunk" / "checkpoints").iterdir())
    by_checkpoint = make(train__steps=4, schedule=second, optimizer_state=state, branch={"run": str(folder)})
    assert weights(by_checkpoint, tmp_path / "by_checkpoint") == whole


def test_a_branch_off_a_run_of_stages_goes_on_with_the_windows_of_all_of_them(tiny_folder, few, tmp_path, monkeypatch):
    num_windows, stages = epoch_in_stages(few, (4, 2))
    watch = Watch(monkeypatch)
    run_recipe(recipe_of(tiny_folder, few.path, stages=stages[:2], **WHOLE), tmp_path / "trunk")
    rest = recipe_of(
        tiny_folder, few.path, branch={"run": str(tmp_path / "trunk")}, **WHOLE | {"train__steps": num_windows - 6}
    )
    run_recipe(rest, tmp_path / "rest")
    rows = [row for step in watch.rows() for row in step]
    assert len(set(rows)) == len(rows) == num_windows


def test_a_rewarming_to_the_rate_that_it_comes_from_is_no_interruption(make, tmp_path):
    whole = weights(make(schedule=CONSTANT), tmp_path / "whole")

    def parted(peak: float, first: float) -> bytes:
        warm = {"name": "constant", "warmup": 3, "start_lr_ratio": first}
        stages = [
            {"name": "main", "train": {"steps": 4}, "schedule": CONSTANT},
            {"name": "again", "train": {"steps": 4}, "schedule": warm, "optimizer": {"lr": peak}},
        ]
        return weights(make(stages=stages), tmp_path / f"{peak}-{first}")

    assert parted(3e-3, 1.0) == whole
    assert parted(3e-3, 0.0) != whole
    assert parted(2e-3, 1.0) != whole


def test_a_rewarming_after_a_decay_begins_at_the_rate_that_the_decay_ended_with(make, tmp_path, capsys):
    decayed = {"name": "linear", "warmup": 0, "min_lr_ratio": 0.1}
    stages = [
        {"name": "main", "train": {"steps": 4}, "schedule": decayed},
        {"name": "again", "train": {"steps": 4}, "schedule": {"name": "constant", "warmup": 4, "start_lr_ratio": 0.1}},
    ]
    run_recipe(make(stages=stages), tmp_path / "run")
    rates = column(tmp_path / "run", "optim/lr")
    assert rates[3] == pytest.approx(3e-4)
    assert rates[4:] == pytest.approx([3e-3 * (0.1 + 0.9 * t / 4) for t in range(1, 5)])


def test_a_branch_whose_rate_leaps_says_so(make, tmp_path, capsys):
    run_recipe(make(train__steps=4, schedule={"name": "linear", "warmup": 0}), tmp_path / "trunk")
    branch = {"run": str(tmp_path / "trunk")}
    leap, smooth = {"name": "constant", "warmup": 0}, {"name": "constant", "warmup": 0}
    capsys.readouterr()
    run_recipe(make(train__steps=1, schedule=smooth, optimizer__lr=3e-4, branch=branch), tmp_path / "smooth")
    assert "jumps" not in capsys.readouterr().err
    run_recipe(make(train__steps=1, schedule=leap, branch=branch), tmp_path / "leap")
    assert "jumps from 0.0003 at the checkpoint to 0.003" in capsys.readouterr().err


def test_a_budget_beyond_all_domains_together_is_refused_beforehand(make, tmp_path):
    """Where one domain takes the place of another, all of them can still end."""
    limits = {"data__max_epochs": 0.1, "data__exhausted": "redistribute"}
    with pytest.raises(DataError, match=r"stage main wants .* windows by its end, all domains together have"):
        run_recipe(make(train__steps=500, **limits), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    open_inputs(make(train__steps=2, **limits), tmp_path / "run")


@pytest.mark.parametrize("order", ["original", "reshuffled"])
def test_stages_that_replay_the_same_go_on_in_it(make, earlier, tmp_path, monkeypatch, order):
    """One pass is one pass through all of them; a stop between or inside of them changes nothing."""
    replay = {"run": str(earlier), "fraction": 0.25, "order": order}
    stages = [{"name": name, "train": {"steps": 4}} for name in ("a", "b", "c")]
    stages[1]["replay"] = None
    recipe = make(replay=replay, stages=stages)
    watch = Watch(monkeypatch, [6, 10])
    for _ in range(2):
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
    run_recipe(recipe, tmp_path / "run")
    replayed = [[s for s in step if s.domain.startswith(REPLAYED)] for step in watch.samples]
    assert [len(step) for step in replayed] == [1] * 4 + [0] * 4 + [1] * 4
    taken = [tuple(sample) for step in replayed for sample in step]
    assert len(set(taken)) == 8, "none of them twice"
    alone = make(replay=replay, train__steps=8)
    plan = sampling_of(alone.resolved_stages[0], DataFolder(Path(alone.data.dir)), alone.seed, tmp_path).plan()
    whole = [tuple(s) for s in plan.take(8 * 4) if s.domain.startswith(REPLAYED)]
    assert taken == whole


def test_one_pass_of_replay_is_one_through_all_stages(make, earlier, tmp_path):
    """The run had 32 sequences: 20 of them in each of two stages are more."""
    stages = [{"name": name, "train": {"steps": 10}} for name in ("a", "b")]
    replay = {"run": str(earlier), "fraction": 0.5}
    with pytest.raises(UsageError, match=r"comes to 40 sequences by the end of stage b, more than the 32"):
        run_recipe(make(replay=replay, stages=stages), tmp_path / "run")
    open_inputs(make(replay=replay | {"repeat": True}, stages=stages), tmp_path / "run")
    open_inputs(make(replay=replay, stages=stages[:1]), tmp_path / "run")
