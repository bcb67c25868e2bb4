"""`distill:` in whole runs: what it changes, what it leaves, what it refuses, and what is written down of it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from factories import model_folder
from scionlm.cli import main as cli
from scionlm.core.errors import DataError, StoppedError, UsageError
from scionlm.core.records import read_json, write_json
from scionlm.recipes import training as training_module
from scionlm.recipes.calibrate import calibrated
from scionlm.recipes.config_distill import DistillConfig
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.run import run_recipe
from scionlm.recipes.teacher_layers import layer_map
from scionlm.report import write_report
from scionlm.sources import open_folder
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.lineage import plan_origins
from whole_runs import Watch, column, metrics_of, quicken, recipe_of, weights_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def recipe(tiny_folder, data_folder):
    def make(distill=None, **settings):
        return recipe_of(tiny_folder, data_folder.path, distill=distill, **settings)

    return make


def test_weight_zero_is_a_run_without_a_teacher_to_the_bit(recipe, tmp_path):
    run_recipe(recipe(), tmp_path / "plain")
    unused = {"weight": 0.0, "schedule": "linear", "until": 500}  # a schedule that is too long for the run
    run_recipe(recipe(unused), tmp_path / "zero")
    run_recipe(recipe({"weight": 0.5}), tmp_path / "half")
    assert weights_of(tmp_path / "zero") == weights_of(tmp_path / "plain") != weights_of(tmp_path / "half")
    assert metrics_of(tmp_path / "zero") == metrics_of(tmp_path / "plain")
    assert read_json(tmp_path / "zero" / "training.json")["distill"] is None
    write_report(tmp_path / "zero", tmp_path / "zero.html")
    assert "Learning from the teacher" not in (tmp_path / "zero.html").read_text()
    assert "teacher" not in read_json(tmp_path / "zero" / "manifest.json")


def test_a_run_says_what_it_learned_from_whom_and_what_that_took(recipe, tmp_path, tiny_folder):
    out = tmp_path / "run"
    settings = {"weight": 0.75, "schedule": "linear", "until": 4, "hidden": {"weight": 2.0}}
    result = run_recipe(recipe(settings, train__z_loss=0.01), out)
    facts = result["training"]["distill"]
    assert (facts["teacher"], facts["teacher_steps"], facts["weight"]) == (str(tiny_folder), 4, 0.75)
    assert 0 < facts["teacher_seconds"] < result["training"]["seconds"]
    for name in ("divergence_nats", "hidden_error_ratio"):
        assert len(column(out, f"train/{name}")) == 4
    assert len(column(out, "speed/teacher_share")) == 4
    lines = [line for line in metrics_of(out) if "train/loss_nats" in line]
    assert len(lines) == len(column(out, "train/z_loss_nats")) == 8
    for number, line in enumerate(lines[:5]):
        factor = max(1 - number / 4, 0.0)
        share = 0.75 * factor
        total = (1 - share) * line["train/nll_nats"] + share * line.get("train/divergence_nats", 0.0)
        total += 2 * factor * line.get("train/hidden_error_ratio", 0.0) + line["train/z_loss_nats"]
        assert line["train/loss_nats"] == pytest.approx(total, rel=1e-5)
    manifest = read_json(out / "manifest.json")
    assert manifest["teacher"] == manifest["source"]
    assert "projections" not in " ".join(path.name for path in (out / "model").iterdir())
    page = tmp_path / "report.html"
    write_report(out, page)
    text = page.read_text()
    for words in ("Learning from the teacher", "Parts of the training loss", "Error of the hidden states", "z-loss"):
        assert words in text
    plan = read_json(out / "plan.json")
    assert plan["teacher_flops"] > 0
    assert result["training"]["flops"] == plan["flops"]


def test_a_control_learns_from_the_teacher_as_well(recipe, tmp_path):
    run_recipe(recipe({"hidden": {}}, control=True), tmp_path / "run")
    assert len(column(tmp_path / "run" / "control", "train/divergence_nats")) == 8
    assert len(column(tmp_path / "run" / "control", "train/hidden_error_ratio")) == 8


def test_any_model_with_the_same_tokenizer_can_teach(recipe, tmp_path, wide_folder):
    out = tmp_path / "run"
    result = run_recipe(recipe({"teacher": str(wide_folder), "hidden": {}}), out)
    assert result["training"]["distill"]["teacher"] == str(wide_folder)
    manifest = read_json(out / "manifest.json")
    assert manifest["teacher"]["sha256"] == open_folder(wide_folder).weights_fingerprint()
    assert manifest["teacher"]["sha256"] != manifest["source"]["sha256"]
    errors = column(out, "train/hidden_error_ratio")
    assert errors[-1] < errors[0]  # its projections learn
    card = (out / "model" / "README.md").read_text()
    assert f"Learned also from `{wide_folder}` (licence: mit)" in card
    named = read_json(out / "model" / "provenance.json")["teacher"]
    assert named == {"name": str(wide_folder), "revision": None, "license": "mit"}


def test_a_teacher_with_another_tokenizer_is_refused_by_name(recipe, tmp_path, data_folder):
    other = model_folder(tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=rf"distill\.teacher .*other.* has another tokenizer than .*{data_folder.path}"):
        run_recipe(recipe({"teacher": str(other)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_refused_before_anything_begins(recipe, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        run_recipe(recipe({"teacher": "./nowhere"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_refuses_another_teacher_of_the_same_name(recipe, tmp_path, wide_folder, monkeypatch):
    folder = tmp_path / "teacher"
    shutil.copytree(wide_folder, folder)
    settings, out = {"teacher": str(folder)}, tmp_path / "run"
    with monkeypatch.context() as patch:
        Watch(patch, {3})
        with pytest.raises(StoppedError):
            run_recipe(recipe(settings), out)
    model_folder(folder, seed=9, hidden_size=48, num_hidden_layers=7, vocab_size=328)
    with pytest.raises(UsageError, match=r"another teacher: its sha256 has changed"):
        run_recipe(recipe(settings), out, allow_change=True)
    with pytest.raises(UsageError, match=r"distill\.weight .*cannot change"):
        run_recipe(recipe(settings | {"weight": 0.1}), out)


def test_sequences_longer_than_a_table_of_positions_are_refused(tmp_path, data_folder, recipe):
    short = model_folder(tmp_path / "short", model_type="gpt2", max_position_embeddings=16)
    with pytest.raises(UsageError, match=r"data\.seq_len 24: .*short has 16 positions"):
        run_recipe(recipe({"teacher": str(short)}), tmp_path / "run")


LAYERS = {
    "next": {0: 3, 1: 4, 2: 6}, "same": {0: 0, 1: 4, 2: 5}, "uniform": {0: 1, 1: 3, 2: 6},
}  # fmt: skip


@pytest.mark.parametrize("wanted", LAYERS)
def test_layers_are_matched_by_where_they_came_from(wide_folder, tiny_folder, wanted):
    """Layers 0, 4 and 5 of seven: `next` asks each for what the next one used to read."""
    teacher = open_folder(wide_folder)
    plan = plan_depth(7, None, [0, 4, 5], None, name=teacher.name)
    config = DistillConfig.model_validate({"hidden": {"layers": wanted}})
    assert layer_map(config, teacher, plan_origins([teacher], plan)) == LAYERS[wanted]
    strange = open_folder(tiny_folder)  # none of its layers: by depth, five of them
    assert layer_map(config, strange, plan_origins([teacher], plan)) == {0: 0, 1: 2, 2: 4}
    given = DistillConfig.model_validate({"hidden": {"layers": [[2, 6], [0, 1]]}})
    assert layer_map(given, teacher, plan_origins([teacher], plan)) == {2: 6, 0: 1}
    for pair in ([3, 0], [0, 7], [-1, 0]):
        wrong = DistillConfig.model_validate({"hidden": {"layers": [pair]}})
        with pytest.raises(UsageError, match=r"distill\.hidden\.layers .* 0-2, the teacher 0-6"):
            layer_map(wrong, teacher, plan_origins([teacher], plan))
    twice = DistillConfig.model_validate({"hidden": {"layers": [[0, 1], [0, 2]]}})
    with pytest.raises(UsageError, match="twice"):
        layer_map(twice, teacher, plan_origins([teacher], plan))
    assert layer_map(DistillConfig(), teacher, plan_origins([teacher], plan)) == {}


def test_a_model_of_the_same_name_that_was_another_is_matched_by_depth(tiny_folder, capsys):
    teacher = open_folder(tiny_folder)
    config = DistillConfig.model_validate({"hidden": {}})
    origins = [[{"name": teacher.name, "index": index, "of": 7}] for index in (0, 6)]
    assert layer_map(config, teacher, origins) == {0: 1, 1: 4}
    assert "matched by depth" in capsys.readouterr().err


def test_the_source_by_another_name_is_the_source(recipe, tmp_path, tiny_folder):
    settings = {"teacher": f"{tiny_folder}/../{tiny_folder.name}/", "hidden": {}}
    run_recipe(recipe(settings), tmp_path / "other")
    run_recipe(recipe({"hidden": {}}), tmp_path / "source")
    assert weights_of(tmp_path / "other") == weights_of(tmp_path / "source")


def test_a_teacher_with_broken_weights_is_named(recipe, tmp_path, wide_folder, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(wide_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="what the teacher adds is not finite: its weights are broken"):
        run_recipe(recipe({"teacher": str(folder)}), tmp_path / "run")
    assert read_json(tmp_path / "run" / "status.json")["exit_code"] == 65
    assert capsys.readouterr().err.count("not finite") == 3  # so many were left out before


def test_a_stacked_layer_learns_what_it_can(tiny_folder):
    teacher = open_folder(tiny_folder)
    origins = [[{"name": teacher.name, "index": index, "of": 5}] for index in (0, 1, 0, 1)] + [[]]
    config = DistillConfig.model_validate({"hidden": {}})
    assert layer_map(config, teacher, origins) == {0: 0, 2: 0, 4: 4}  # before layer 0 there is nothing to learn


def test_an_heir_of_an_heir_learns_from_the_first_of_the_line(tmp_path, tiny_folder, recipe):
    run_recipe(recipe(inherit__layers=None, inherit__keep="0,2,4"), tmp_path / "first")
    heir = open_folder(tmp_path / "first" / "model")
    plan = plan_depth(3, None, [0, 2], None, name=heir.name)
    config = DistillConfig.model_validate({"hidden": {"layers": "same"}})
    teacher = open_folder(tiny_folder)
    assert layer_map(config, teacher, plan_origins([heir], plan)) == {0: 0, 1: 4}


def test_a_plan_counts_the_teacher(recipe, wide_folder):
    plain, taught = plan_recipe(recipe(), "H100"), plan_recipe(recipe({"teacher": str(wide_folder)}), "H100")
    assert "teacher" not in plain["seconds_by_part"]
    assert taught["seconds_by_part"]["training"] == plain["seconds_by_part"]["training"]
    assert taught["flops"] - plain["flops"] == taught["teacher_flops"] > 0
    assert taught["memory_by_part"]["teacher"] > 0
    assert taught["memory_bytes_per_device"] > plain["memory_bytes_per_device"]
    half = plan_recipe(recipe({"teacher": str(wide_folder), "schedule": "linear", "until": 4}), "H100")
    assert half["teacher_flops"] == pytest.approx(taught["teacher_flops"] / 2)
    whole = plan_recipe(recipe({"teacher": str(wide_folder), "schedule": "linear", "final_ratio": 0.5}), "H100")
    assert whole["teacher_flops"] == taught["teacher_flops"]
    assert plan_recipe(recipe({"weight": 0.0}), "H100")["flops"] == plain["flops"]


def test_a_plan_refuses_what_the_run_would(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"distill\.hidden\.layers \[0, 9\]"):
        plan_recipe(recipe({"hidden": {"layers": [[0, 9]]}}))
    short = model_folder(tmp_path / "short", model_type="gpt2", max_position_embeddings=16)
    with pytest.raises(UsageError, match="16 positions"):
        plan_recipe(recipe({"teacher": str(short)}))


def test_a_plan_counts_what_hidden_states_and_projections_take(recipe, wide_folder):
    def taken(**hidden):
        found = plan_recipe(recipe({"teacher": str(wide_folder), "hidden": hidden or None}), "H100")
        return found["memory_by_part"]["teacher"], found["checkpoint_bytes"]

    bare, one = taken(), taken(layers=[[0, 0]])
    tokens, width = 24 * 4, 4  # the recipe computes in float32
    projection = 48 * 32
    assert one[0] - bare[0] == tokens * 48 * (width + 4) + 16 * projection
    assert one[1] - bare[1] == 12 * projection
    assert taken(layers=[[0, 0]], loss="cosine")[0] - one[0] == tokens * 48 * 4
    assert taken(layers=[[0, 0], [1, 1]])[0] - one[0] == one[0] - bare[0]


def test_a_calibrated_plan_measures_the_teacher_apart(recipe, wide_folder):
    found = calibrated(recipe({"teacher": str(wide_folder)}))
    parts = found["seconds_by_part"]
    assert list(parts) == ["training", "teacher", "evaluation"]
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(found["seconds"])


def test_plan_prints_the_teacher(tiny_folder, data_folder, capsys):
    words = [f"source={tiny_folder}", f"data.dir={data_folder.path}", "train.steps=5", "inherit.layers=2"]
    assert cli.run(["plan", "inheritune", *words, "distill.weight=0.9", "data.seq_len=24",
                    "train.global_batch_tokens=48"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert ", teacher " in shown
    assert "% on top of training; without it" in shown
    assert "teacher " in shown.partition("memory of a step")[2]


def test_a_time_can_be_the_length_of_the_way(recipe, tmp_path, monkeypatch):
    from scionlm.recipes import calibrate

    speed = calibrate.Speed([0.5], [0.1], None)
    monkeypatch.setattr(calibrate, "measure_steps", lambda *_: speed)
    out = tmp_path / "run"
    run_recipe(recipe({"schedule": "cosine", "until": "2 s"}), out)
    assert len(column(out, "train/divergence_nats")) == 4
    assert training_module.read_json(out / "training.json")["distill"]["until"] == 4


def test_broken_records_of_a_teacher_do_not_break_the_page(recipe, tmp_path):
    out = tmp_path / "run"
    run_recipe(recipe({"hidden": {}}), out)
    for value in ({"teacher": 7, "teacher_seconds": "long", "num_parameters": None}, ["x"], None, "teacher"):
        result = read_json(out / "result.json")
        result["training"]["distill"] = value
        write_json(out / "result.json", result)
        manifest = read_json(out / "manifest.json")
        manifest["teacher"] = {"name": "<script>alert(1)</script>"}
        write_json(out / "manifest.json", manifest)
        page = tmp_path / "report.html"
        write_report(out, page)
        assert "<script>alert" not in page.read_text()


def test_a_branch_takes_projections_over_where_both_have_the_same(recipe, tmp_path, wide_folder):
    taught = {"teacher": str(wide_folder), "hidden": {}}
    first = tmp_path / "first"
    run_recipe(recipe(taught), first)
    branch = {"run": str(first)}
    going_on = {"schedule": {"name": "constant", "warmup": 0}, "train__steps": 2, "branch": branch}
    errors = {}
    for name, settings in {"same": taught, "other": taught | {"hidden": {"layers": [[0, 1]]}}, "none": None}.items():
        run_recipe(recipe(settings, **going_on), tmp_path / name)
        errors[name] = column(tmp_path / name, "train/hidden_error_ratio")
    last = column(first, "train/hidden_error_ratio")
    assert errors["same"][0] < (last[0] + last[-1]) / 2  # they had learned, and go on
    assert errors["other"][0] > 0.8  # drawn anew
    assert errors["none"] == []
