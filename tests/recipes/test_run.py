"""Whole runs on a tiny model: what ends up in the run folder, and what may not change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from factories import corpora_file, model_folder
from scionlm import api
from scionlm.cli import main as cli
from scionlm.core.errors import DataError, NewerFormatError, StoppedError, StorageError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.evaluation.loss import domain_losses, model_token_nll
from scionlm.parallel.ranks import ALONE
from scionlm.recipes import child as child_module
from scionlm.recipes import run as run_module
from scionlm.recipes import setting as setting_module
from scionlm.recipes import training as training_module
from scionlm.recipes.child import control_recipe
from scionlm.recipes.inputs import check_tokenizer
from scionlm.recipes.presets import load_recipe, preset_names
from scionlm.recipes.run import run_recipe, settle_recipe
from scionlm.sources import load_hf_model, load_tokenizer, open_folder
from scionlm.train import metrics as metrics_module
from scionlm.train import step as step_module
from whole_runs import Watch, quicken, recipe_of

SETTINGS = {
    "data.mixture": {"alpha": 0.6, "beta": 0.4},
    "data.seq_len": 24,
    "inherit.layers": 3,
    "train.tokens": 24 * 4 * 10,
    "train.global_batch_tokens": 24 * 4,
    "train.precision": "fp32",
    "optimizer.lr": 3e-3,
    "evaluate.tokens_per_domain": 200,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture
def settings(tiny_folder, data_folder):
    return SETTINGS | {"source": str(tiny_folder), "data.dir": str(data_folder.path)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, data_folder):
    """A run with its control."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = SETTINGS | {"source": str(tiny_folder), "data.dir": str(data_folder.path)}
    seen = []
    original = step_module.micro_batches

    def spy(batch, size):
        seen.append(batch)
        return original(batch, size)

    step_module.micro_batches = spy
    try:
        result = run_recipe(load_recipe("inheritune-mini", settings), out)
    finally:
        step_module.micro_batches = original
    return out, result, seen


def test_the_run_folder_holds_what_it_promises(finished):
    out, result, _ = finished
    assert read_json(out / "status.json")["state"] == "done"
    assert read_json(out / "result.json") == result
    manifest = read_json(out / "manifest.json")
    assert manifest["source"]["sha256"]
    assert manifest["data"]["fingerprint"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["precision"] == "fp32"
    for document in (*out.glob("*.json"), *(out / "control").glob("*.json")):
        assert json.loads(document.read_text())["format_version"] == 1, document
    names = {path.name for path in (out / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "provenance.json"}
    assert not list(out.rglob("*.tmp"))


def test_child_and_control_see_identical_batches(finished):
    _, _, seen = finished
    steps = len(seen) // 2
    assert steps == 10
    for mine, theirs in zip(seen[:steps], seen[steps:], strict=True):
        assert (mine.input_ids == theirs.input_ids).all()
        assert (mine.labels == theirs.labels).all()
    assert (seen[0].input_ids != seen[1].input_ids).any()


def test_a_control_sees_the_batches_of_its_child_also_where_weights_move(settings, tmp_path, monkeypatch):
    seen = []
    original = step_module.micro_batches
    monkeypatch.setattr(step_module, "micro_batches", lambda batch, size: seen.append(batch) or original(batch, size))
    moving = {
        "reweight.rule": "paper", "reweight.every": 2, "reweight.tokens_per_domain": 100, "reweight.step_size": 40,
        "reweight.reference": {"alpha": 4.0, "beta": 4.1},
    }  # fmt: skip
    run_recipe(load_recipe("inheritune-mini", settings | moving), tmp_path / "run")
    steps = len(seen) // 2
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(seen[:steps], seen[steps:], strict=True))
    first, last = read_jsonl(tmp_path / "run" / "metrics.jsonl"), read_jsonl(tmp_path / "run/control/metrics.jsonl")
    weights = [
        [line["reweight/alpha/weight"] for line in lines if "reweight/alpha/weight" in line] for lines in (first, last)
    ]
    assert weights[0] == weights[1]
    assert len(set(weights[0])) > 1
    assert (tmp_path / "run/ledger.jsonl").read_text() == (tmp_path / "run/control/ledger.jsonl").read_text()


def test_the_child_learns_and_the_control_starts_elsewhere(finished):
    _, result, _ = finished
    for domain, loss in result["domains"].items():
        assert loss["nll"] < result["before"][domain]["nll"]
        assert result["control"]["before"][domain]["nll"] != result["before"][domain]["nll"]
    assert result["control"]["num_seeds"] == 1
    assert set(result["samples"][0]["texts"]) == {"source", "child", "control"}


def test_the_final_losses_are_those_of_the_exported_folder(finished, data_folder):
    out, result, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    losses = domain_losses(model_token_nll(model), data_folder, ["alpha", "beta"], 24, 200)
    for domain, loss in losses.items():
        assert loss.nll == pytest.approx(result["domains"][domain]["nll"], abs=1e-6)
        assert loss.num_tokens == result["domains"][domain]["num_tokens"] == 200
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    worse = domain_losses(model_token_nll(model), data_folder, ["alpha"], 24, 200)["alpha"]
    assert worse.nll != pytest.approx(result["domains"]["alpha"]["nll"], abs=1e-6)


def test_the_source_losses_are_the_sources_own(finished, data_folder, tiny_folder):
    _, result, _ = finished
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    losses = domain_losses(model_token_nll(model), data_folder, ["alpha", "beta"], 24, 200)
    for domain, loss in losses.items():
        assert loss.nll == pytest.approx(result["source"]["domains"][domain]["nll"], abs=1e-6)


def test_the_tokenizer_of_the_result_is_the_sources(finished, tiny_folder):
    out, _, _ = finished
    mine, theirs = AutoTokenizer.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(tiny_folder)
    assert mine.encode("the house of the day") == theirs.encode("the house of the day")


def test_the_model_card_says_what_it_must(finished):
    out, result, _ = finished
    card = (out / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert "Layers 0, 1, 4" in card
    assert front["metrics"] == ["perplexity", "bits_per_byte"]
    assert "base_model" not in front  # a folder here is no hub id
    (index,) = front["model-index"]
    found = {one["dataset"]["type"]: one["metrics"][0]["value"] for one in index["results"]}
    assert found == {name: round(loss["perplexity"], 4) for name, loss in result["domains"].items()}
    for loss in result["domains"].values():
        assert f"{loss['nll']:.4f}" in card
    assert "random" in (out / "control" / "model" / "README.md").read_text()


def test_the_same_command_again_changes_nothing(finished, capsys):
    out, result, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run_recipe(load_recipe(str(out / "config.yaml")), out) == result
    assert "finished already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_config_yaml_repeats_the_run_bitwise(finished, tmp_path):
    out, result, _ = finished
    again = run_recipe(load_recipe(str(out / "config.yaml")), tmp_path / "again")
    assert again["domains"] == result["domains"]
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()
    other = run_recipe(load_recipe(str(out / "config.yaml"), {"seed": 1, "control": False}), tmp_path / "other")
    assert other["domains"] != result["domains"]


@pytest.mark.parametrize("stop_at", [2, 5, 7, 12, 19])
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(finished, settings, tmp_path, monkeypatch, stop_at):
    """Stops in the child's training and in the control's (steps 11 to 20 of the count)."""
    import os
    import signal

    out, result, _ = finished
    count = 0
    original = step_module.micro_batches

    def spy(batch, size):
        nonlocal count
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, size)

    monkeypatch.setattr(step_module, "micro_batches", spy)
    recipe = load_recipe("inheritune-mini", settings)
    with pytest.raises(StoppedError, match=r"to go on: "):
        run_recipe(recipe, tmp_path / "run")
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    again = run_recipe(recipe, tmp_path / "run")
    assert count == 20
    assert again["domains"] == result["domains"]
    assert again["control"]["domains"] == result["control"]["domains"]
    for part in ("model", "control/model"):
        name = f"{part}/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()
    mine, theirs = (
        [(r["step"], r.get("train/nll_nats"), r.get("eval/alpha/nll_nats")) for r in read_jsonl(f / "metrics.jsonl")]
        for f in (tmp_path / "run", out)
    )
    assert mine == theirs


def test_changed_settings_are_refused_by_name(finished, settings):
    out, _, _ = finished
    with pytest.raises(UsageError, match=r"optimizer\.lr \(0\.003 -> 0\.001\)"):
        run_recipe(load_recipe("inheritune-mini", settings | {"optimizer.lr": 1e-3}), out)


def test_auto_values_are_kept_from_the_first_start(finished, settings):
    out, _, _ = finished
    recipe = load_recipe("inheritune-mini", settings | {"train.precision": "auto", "train.compile": "auto"})
    assert settle_recipe(recipe, out, allow_change=False).train.precision == "fp32"


def test_a_folder_with_something_else_in_it_is_refused(settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_recipe(load_recipe("inheritune-mini", settings), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inherit.layers": 0}, UsageError, "layers: 0"),
        ({"inherit.layers": -1}, UsageError, "layers: -1"),
        ({"inherit.layers": 6}, UsageError, "5 layers"),
        ({"data.mixture": {"alhpa": 1.0}}, UsageError, "did you mean 'alpha'"),
        ({"data.dir": "nowhere"}, UsageError, "scion prepare"),
        ({"source": "./nowhere"}, UsageError, "nowhere"),
        ({"data.seq_len": 10**5, "train.global_batch_tokens": 10**5}, DataError, "fewer than one window"),
    ],
)
def test_a_wrong_request_is_clear_and_leaves_nothing(settings, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        run_recipe(load_recipe("inheritune-mini", settings | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def with_more_tokens(folder, teacher, special, separator):
    """Return a recipe of a model that has no embedding for its tokenizer's last token, its text naming that one."""
    source, other = (model_folder(folder / name, seed=seed) for seed, name in enumerate(("source", "other")))
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([AddedToken("<image>", special=special)])
    for path in (source, other):
        tokenizer.save(str(path / "tokenizer.json"))
    corpora = corpora_file(folder / "text", source, **separator)
    lines = [json.loads(line) for line in (folder / "text" / "alpha.jsonl").read_text().splitlines()]
    named = [json.dumps(line | {"text": f"{line['text']} <image>"}) for line in lines]
    (folder / "text" / "alpha.jsonl").write_text("\n".join(named))
    prepare(load_corpora(corpora), folder / "text", folder / "data")
    return recipe_of(source, folder / "data", distill={"teacher": str(other)} if teacher else None)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_special_token_without_an_embedding_is_none_that_texts_can_hold(tmp_path, teacher):
    """Gemma 3's text models have none for the token of images."""
    run_recipe(with_more_tokens(tmp_path, teacher, True, {}), tmp_path / "run")
    data, folder = DataFolder(tmp_path / "data"), open_folder(tmp_path / "run" / "model")
    assert data.tokenizer.vocab_size == 1 + load_hf_model(folder).config.vocab_size == 321
    check_tokenizer(folder, data)


@pytest.mark.parametrize(("special", "settings"), [(False, {}), (True, {"separator": "<image>"})])
def test_tokens_without_an_embedding_that_texts_can_hold_are_refused(tmp_path, special, settings):
    with pytest.raises(DataError, match=r"has no embedding for token 320 of its tokenizer, which the data in .*data"):
        run_recipe(with_more_tokens(tmp_path, False, special, settings), tmp_path / "run")


def test_a_teacher_without_an_embedding_for_a_token_of_texts_is_refused(tiny_folder, data_folder, tmp_path):
    smaller = model_folder(tmp_path / "smaller", vocab_size=319)
    with pytest.raises(DataError, match=r"distill\.teacher .*smaller"):
        run_recipe(recipe_of(tiny_folder, data_folder.path, distill={"teacher": str(smaller)}), tmp_path / "run")


def test_data_of_another_tokenizer_is_refused(settings, tmp_path, tiny_folder):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="tokenizer"):
        run_recipe(load_recipe("inheritune-mini", settings | {"source": str(other)}), tmp_path / "run")


def test_random_initialization_alone_is_the_control(finished, settings, tmp_path):
    _, result, _ = finished
    alone = run_recipe(
        load_recipe("inheritune-mini", settings | {"inherit.init": "random", "control": False}), tmp_path / "r"
    )
    assert alone["domains"] == result["control"]["domains"]


def test_a_diverged_run_says_so_and_exits_three(settings, tmp_path, monkeypatch):
    original = training_module.Objective.forward

    def broken(self, *arguments):
        loss, *rest = original(self, *arguments)
        return loss * float("nan"), *rest

    monkeypatch.setattr(training_module.Objective, "forward", broken)
    from scionlm.core.errors import DivergenceError

    with pytest.raises(DivergenceError, match=r"optimizer\.lr"):
        run_recipe(load_recipe("inheritune-mini", settings), tmp_path / "run")
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 3)


def test_a_folder_with_somebody_elses_status_is_never_cleared(settings, tmp_path):
    out = tmp_path / "mine"
    (out / "data").mkdir(parents=True)
    (out / "data" / "thesis.txt").write_text("years of work")
    (out / "status.json").write_text('{"state": "ok"}')
    with pytest.raises(UsageError, match="not empty"):
        run_recipe(load_recipe("inheritune-mini", settings | {"data.dir": "nowhere"}), out)
    assert (out / "data" / "thesis.txt").read_text() == "years of work"


def test_a_run_whose_config_is_gone_loses_nothing_to_a_wrong_command(finished, settings, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "config.yaml").unlink()
    (out / "status.json").write_text('{"format_version": 1, "state": "stopped"}')
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(UsageError, match="scion prepare"):
        run_recipe(load_recipe("inheritune-mini", settings | {"data.dir": "nowhere"}), out)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_other_data_or_weights_under_a_run_are_refused(settings, tmp_path, tiny_folder):
    import shutil

    copy = tmp_path / "source"
    shutil.copytree(tiny_folder, copy)
    mine = settings | {"source": str(copy), "train.tokens": 24 * 4 * 2, "control": False}
    run_recipe(load_recipe("inheritune-mini", mine), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "status.json").write_text('{"format_version": 1, "state": "stopped"}')
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(copy)
    with pytest.raises(UsageError, match="another source"):
        run_recipe(load_recipe("inheritune-mini", mine), tmp_path / "run")


def test_only_what_measures_nothing_earlier_may_change(settings, tmp_path, monkeypatch):
    import os
    import signal

    mine = settings | {"control": False}
    original = step_module.micro_batches

    def spy(batch, size):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, size)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "micro_batches", spy)
        with pytest.raises(StoppedError):
            run_recipe(load_recipe("inheritune-mini", mine), tmp_path / "run")
    for change in ({"inherit.layers": 2}, {"evaluate.tokens_per_domain": 100}, {"seed": 5}):
        with pytest.raises(UsageError, match="cannot change"):
            run_recipe(load_recipe("inheritune-mini", mine | change), tmp_path / "run", allow_change=True)
    with pytest.raises(UsageError, match="--allow-change"):
        run_recipe(load_recipe("inheritune-mini", mine | {"optimizer.lr": 1e-3}), tmp_path / "run")
    again = load_recipe("inheritune-mini", mine | {"optimizer.lr": 1e-3})
    run_recipe(again, tmp_path / "run", allow_change=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optimizer"]["lr"] == 1e-3


def test_a_bf16_source_stays_bf16(settings, tmp_path, tiny_folder):
    import shutil

    from scionlm import api

    half = tmp_path / "half"
    shutil.copytree(tiny_folder, half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    assert api.inherit(str(half), layers=2).dtype == torch.bfloat16
    run_recipe(load_recipe("inheritune-mini", settings | {"source": str(half), "control": False}), tmp_path / "run")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert found.config.tie_word_embeddings
    with safe_open(tmp_path / "run/model/model.safetensors", "pt") as file:  # what is tied is written once
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_control_is_not_averaged_with_its_random_weights(settings, tmp_path):
    average = {"average.method": "start", "average.share": 0.5, "control": True}
    recipe = load_recipe("inheritune-mini", settings | average)
    assert control_recipe(recipe, open_folder(Path(settings["source"]))).average is None
    kept = load_recipe("inheritune-mini", settings | {"average.method": "uniform", "control": True})
    assert control_recipe(kept, open_folder(Path(settings["source"]))).average is not None


@pytest.mark.parametrize("changes", [{"train.tokens": 24 * 4 * 20}, {"export.dtype": "bfloat16"}])
def test_a_model_that_was_exported_is_not_taken_for_one_of_other_settings(settings, tmp_path, monkeypatch, changes):
    """Stopped between its export and its result, and begun again with what `--allow-change` allows."""
    out = tmp_path / "run"

    def stopped(*arguments, **keywords):
        raise StoppedError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(child_module, "_result_of", stopped)
        with pytest.raises(StoppedError):
            run_recipe(load_recipe("inheritune-mini", settings | {"control": False}), out)
    assert (out / "model").exists()
    other = load_recipe("inheritune-mini", settings | {"control": False} | changes)
    before = (out / "config.yaml").read_text()
    with pytest.raises(UsageError, match="was written after 10 steps in"):
        run_recipe(other, out, allow_change=True)
    assert (out / "config.yaml").read_text() == before
    shutil.rmtree(out / "model")
    result = run_recipe(other, out, allow_change=True)
    assert result["training"]["steps"] == other.total_steps


def test_presets_with_dots_in_their_names_have_folders_of_their_own(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(api, "run", lambda recipe, overrides, out, allow_change: asked.append(out) or 1 / 0)
    names = [name for name in preset_names() if "." in name]
    assert len(names) > 2
    for name in [*names, "mine.yaml", "folder/config.yaml"]:
        cli.run(["run", name])
    assert asked == [Path("runs") / name for name in [*names, "mine"]] + [Path("folder")]


def test_what_ends_before_the_work_begins_stands_in_the_status(settings, tmp_path, monkeypatch):
    recipe = load_recipe("inheritune-mini", settings)
    out = tmp_path / "run"

    def ends(error):
        def open_inputs(*arguments, **named):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "open_inputs", open_inputs)
            with pytest.raises(type(error)):
                run_recipe(recipe, out)

    ends(StoppedError("stopped while text was prepared"))
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    Watch(monkeypatch, [4])
    with pytest.raises(StoppedError):
        run_recipe(recipe, out)
    ends(StorageError("the hub cannot be reached"))
    status = read_json(out / "status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 74, 4)
    ends(UsageError("refused"))
    assert read_json(out / "status.json") == status
    assert run_recipe(recipe, out)["training"]["steps"] == 10


def test_a_failure_between_manifest_and_config_leaves_a_free_folder(settings, tmp_path, monkeypatch):
    recipe = load_recipe("inheritune-mini", settings)

    def write_config(*arguments):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(setting_module, "write_config", write_config)
        with pytest.raises(StorageError):
            run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_newer_scion_is_refused_by_name(finished, settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "status.json").write_text('{"format_version": 2, "phase": "over"}')
    with pytest.raises(NewerFormatError, match=r"status\.json has format_version 2"):
        run_recipe(load_recipe("inheritune-mini", settings), out)


@pytest.mark.parametrize("name", ["run", "control"])
def test_a_run_of_any_name_says_how_far_it_is_and_its_control_does_not(settings, tmp_path, monkeypatch, name):
    monkeypatch.setattr(metrics_module, "_BEAT_SECONDS", 0.0)
    folder = tmp_path / name
    setting = SimpleNamespace(ranks=ALONE, recipe=load_recipe("inheritune-mini", settings), folder=folder)
    for out, step in ((folder, 7), (folder / "control", 8)):
        metrics = training_module.open_metrics(setting, out)
        metrics.write({"step": step})
        metrics.close()
    assert read_json(folder / "status.json")["step"] == 7
