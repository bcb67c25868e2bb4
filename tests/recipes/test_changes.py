"""What may have changed when a run goes on: named, refused, or nobody's business."""

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from factories import corpora_file
from scionlm.core.errors import StoppedError, UsageError
from scionlm.core.records import read_json, write_json
from scionlm.data import load_corpora, prepare
from scionlm.recipes import run as run_module
from scionlm.recipes import training as training_module
from scionlm.recipes.changes import Change, find_changes, judge_changes
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe, write_status
from scionlm.train import step as step_module

MANIFEST = {
    "git_commit": "abc123",
    "versions": {"python": "3.11.7", "scionlm": "0.2", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.1"},
    "device": {"kind": "cpu", "name": "a processor", "threads": 2, "precision": "fp32"},
    "source": {"name": "tiny", "revision": None, "sha256": "11"},
    "data": {"dir": "/data", "fingerprint": "22", "tokenizer": "33"},
    "stages": {"a": {"data": "22", "replay": None}, "b": {"data": "44", "replay": None}},
    "replay": None,
}
OUT = "RUN"


def changed(*values) -> dict:
    """Return the manifest with (dotted key, value) changed; a value of None takes the key away."""
    manifest = copy.deepcopy(MANIFEST)
    for key, value in zip(values[::2], values[1::2], strict=True):
        *path, last = key.split(".")
        place = manifest
        for name in path:
            place = place[name]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return manifest


REFUSED_UNLESS_ALLOWED = [
    ("versions.torch", "2.14.0", "versions.torch (2.13.0 -> 2.14.0)"),
    ("versions.transformers", "5.24.0", "versions.transformers (5.23.0 -> 5.24.0)"),
    ("versions.torch", None, "versions.torch (2.13.0 -> None)"),
    ("device.kind", "cuda", "device.kind (cpu -> cuda)"),
    ("device.precision", "bf16", "device.precision (fp32 -> bf16)"),
    ("stages.b.data", "55", "stages.b.data (44 -> 55)"),
]
ONLY_NAMED = [
    ("device.threads", 8, "device.threads (2 -> 8)"),
    ("device.name", "another", "device.name (a processor -> another)"),
    ("versions.python", "3.12.1", "versions.python (3.11.7 -> 3.12.1)"),
    ("versions.scionlm", "0.3", "versions.scionlm (0.2 -> 0.3)"),
    ("versions.numpy", "2.2", "versions.numpy (2.1 -> 2.2)"),
    ("versions.numpy", None, "versions.numpy (2.1 -> None)"),
    ("versions.tokenizers", "0.22", "versions.tokenizers (None -> 0.22)"),
    ("git_commit", "def456", "git_commit (abc123 -> def456)"),
    ("git_commit", "abc123+", "git_commit (abc123 -> abc123+)"),
    ("git_commit", None, "git_commit (abc123 -> None)"),
]
ALWAYS_REFUSED = [("source.sha256", "99", "another source"), ("data.fingerprint", "99", "another data")]
NOBODYS_BUSINESS = [
    ("source.name", "renamed"), ("source.revision", "main"), ("data.dir", "/elsewhere"), ("command", ["scion"]),
    ("started_at", "2026-01-01"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), REFUSED_UNLESS_ALLOWED)
def test_what_changes_the_result_is_refused_by_name_unless_allowed(key, value, words, capsys):
    now = changed(key, value)
    with pytest.raises(UsageError) as caught:
        judge_changes(MANIFEST, now, OUT, allow_change=False)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{OUT} was started with something else that changes the result: {words};")
    assert "--allow-change" in str(caught.value)
    assert capsys.readouterr().err == ""
    (change,) = judge_changes(MANIFEST, now, OUT, allow_change=True)
    assert (change.key, str(change)) == (key, words)
    warning = capsys.readouterr().err
    assert words in warning
    assert "losses will agree" not in warning


@pytest.mark.parametrize(("key", "value", "words"), ONLY_NAMED)
@pytest.mark.parametrize("allow", [False, True])
def test_what_changes_last_bits_at_most_is_only_named(key, value, words, allow, capsys):
    (change,) = judge_changes(MANIFEST, changed(key, value), OUT, allow)
    assert (change.key, str(change)) == (key, words)
    warning = capsys.readouterr().err
    assert f"changed since {OUT} was started: {words}; losses will agree" in warning


@pytest.mark.parametrize(("key", "value", "words"), ALWAYS_REFUSED)
@pytest.mark.parametrize("allow", [False, True])
def test_other_weights_or_data_are_refused_whatever_is_allowed(key, value, words, allow):
    with pytest.raises(UsageError, match=rf"{OUT} was started with {words}: .*use another folder") as caught:
        judge_changes(MANIFEST, changed(key, value), OUT, allow)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("key", "value"), NOBODYS_BUSINESS)
def test_what_changes_nothing_is_not_mentioned(key, value, capsys):
    assert judge_changes(MANIFEST, changed(key, value), OUT, allow_change=False) == []
    assert capsys.readouterr().err == ""


def test_nothing_changed_is_nothing_said(capsys):
    assert find_changes(MANIFEST, copy.deepcopy(MANIFEST)) == []
    assert judge_changes(MANIFEST, copy.deepcopy(MANIFEST), OUT, allow_change=False) == []
    assert capsys.readouterr().err == ""


def test_all_changes_stand_in_one_message():
    now = changed("versions.torch", "2.14.0", "device.precision", "bf16", "device.threads", 1, "git_commit", "def")
    with pytest.raises(UsageError) as caught:
        judge_changes(MANIFEST, now, OUT, allow_change=False)
    for words in ("versions.torch (2.13.0 -> 2.14.0)", "device.precision (fp32 -> bf16)"):
        assert words in str(caught.value)
    assert "threads" not in str(caught.value)
    keys = [change.key for change in judge_changes(MANIFEST, now, OUT, allow_change=True)]
    assert sorted(keys) == ["device.precision", "device.threads", "git_commit", "versions.torch"]


def test_every_key_of_versions_and_device_is_compared():
    """So that a version that is recorded later is compared too."""
    for section in ("versions", "device"):
        for key in [*MANIFEST[section], "something new"]:
            found = find_changes(MANIFEST, changed(f"{section}.{key}", "other"))
            assert found == [Change(f"{section}.{key}", MANIFEST[section].get(key), "other")]


def test_a_manifest_of_before_there_were_stages_is_no_change():
    assert find_changes(changed("stages", None), MANIFEST) == []


# ---------------------------------------------------------------------------------------------------------------------
# Through a run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_folder, data_folder) -> dict:
    return {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": {"alpha": 0.6, "beta": 0.4},
        "data.seq_len": 24, "inherit.layers": 2, "train.tokens": 24 * 4 * 5, "train.global_batch_tokens": 24 * 4,
        "train.precision": "fp32", "optimizer.lr": 3e-3, "evaluate.tokens_per_domain": 100, "control": False,
        "checkpoint.keep": 3,
    }  # fmt: skip


def settle_machine(patch: pytest.MonkeyPatch) -> None:
    """Measure no speed, and be at one commit, whatever is edited meanwhile."""
    patch.setattr(training_module, "peak_flops", lambda runtime: None)
    patch.setattr(run_module, "git_commit", lambda: "abc123")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    settle_machine(monkeypatch)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, settings) -> Path:
    """A run that a signal stopped after its third step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        settle_machine(patch)
        original, count = step_module.micro_batches, iter(range(1, 100))

        def stopping(batch, size):
            if next(count) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(batch, size)

        patch.setattr(step_module, "micro_batches", stopping)
        with pytest.raises(StoppedError):
            run_recipe(load_recipe("inheritune-mini", settings), out)
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> dict:
    """The same run, never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        settle_machine(patch)
        return run_recipe(load_recipe("inheritune-mini", settings), tmp_path_factory.mktemp("whole") / "run")


def edit_manifest(out: Path, key: str, value: object) -> None:
    manifest = read_json(out / "manifest.json")
    *path, last = key.split(".")
    place = manifest
    for name in path:
        place = place[name]
    place[last] = value
    write_json(out / "manifest.json", manifest)


def test_an_unchanged_run_goes_on_without_a_word_about_changes(stopped, settings, whole, capsys):
    before = read_json(stopped / "manifest.json")
    result = run_recipe(load_recipe("inheritune-mini", settings), stopped)
    assert result["domains"] == whole["domains"]
    assert read_json(stopped / "manifest.json") == before
    assert "changed" not in capsys.readouterr().err


def test_a_run_of_another_torch_is_refused_by_name_and_goes_on_where_that_is_allowed(stopped, settings, whole, capsys):
    edit_manifest(stopped, "versions.torch", "2.0.0")
    before = (stopped / "manifest.json").read_bytes()
    recipe = load_recipe("inheritune-mini", settings)
    words = f"versions.torch (2.0.0 -> {torch.__version__})"
    for _ in range(2):  # a refusal changes nothing that the next command would not refuse
        with pytest.raises(UsageError) as caught:
            run_recipe(recipe, stopped)
        assert caught.value.exit_code == 2
        assert words in str(caught.value)
        assert (stopped / "manifest.json").read_bytes() == before
        status = read_json(stopped / "status.json")
        assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 3)
    capsys.readouterr()
    result = run_recipe(recipe, stopped, allow_change=True)
    assert words in capsys.readouterr().err
    assert result["domains"] == whole["domains"]  # it is the same torch, after all
    manifest = read_json(stopped / "manifest.json")
    (entry,) = manifest["changes"]
    assert entry["changed"] == [words]
    assert entry["to"]["versions"]["torch"] == torch.__version__
    assert entry["at"] > manifest["started_at"] or entry["at"] == manifest["started_at"]
    assert {k: v for k, v in manifest.items() if k != "changes"} == json.loads(before)  # the first start's stays


def test_a_change_that_was_allowed_once_is_not_asked_about_again(stopped, settings, monkeypatch):
    """What it is compared with is what it was gone on with last."""
    edit_manifest(stopped, "versions.torch", "2.0.0")
    recipe = load_recipe("inheritune-mini", settings)
    with monkeypatch.context() as patch:
        stop_at_the_next_step(patch)
        with pytest.raises(StoppedError):
            run_recipe(recipe, stopped, allow_change=True)
    assert read_json(stopped / "status.json")["step"] == 4
    run_recipe(recipe, stopped)
    assert len(read_json(stopped / "manifest.json")["changes"]) == 1


def stop_at_the_next_step(patch: pytest.MonkeyPatch) -> None:
    original = step_module.micro_batches

    def stopping(batch, size):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, size)

    patch.setattr(step_module, "micro_batches", stopping)


def test_other_data_behind_a_replay_is_refused(tmp_path, settings, tiny_folder, monkeypatch):
    """What is replayed is trained on too."""

    def prepare_replayed(**changes):
        shutil.rmtree(tmp_path / "corpora", ignore_errors=True)
        path = corpora_file(tmp_path / "corpora", tiny_folder, num_documents=20, **changes)
        prepare(load_corpora(path), path.parent, path.parent / "data")

    prepare_replayed()
    replay = {"data": str(tmp_path / "corpora" / "data"), "fraction": 0.25}
    recipe = load_recipe("inheritune-mini", settings | {"replay": replay})
    with monkeypatch.context() as patch:
        stop_at_the_next_step(patch)
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
    prepare_replayed(words=100)
    with pytest.raises(UsageError, match=r"changes the result: stages\.main\.replayed "):
        run_recipe(recipe, tmp_path / "run")


def test_another_number_of_threads_and_another_commit_are_named_and_it_goes_on(stopped, settings, whole, capsys):
    edit_manifest(stopped, "device.threads", 999)
    edit_manifest(stopped, "git_commit", "abc")
    result = run_recipe(load_recipe("inheritune-mini", settings), stopped)
    warning = capsys.readouterr().err
    assert "git_commit (abc -> " in warning
    assert "device.threads (999 -> " in warning
    assert "losses will agree" in warning
    assert result["domains"] == whole["domains"]
    assert len(read_json(stopped / "manifest.json")["changes"][0]["changed"]) == 2


@pytest.mark.parametrize(("key", "what"), [("source.sha256", "source"), ("data.fingerprint", "data")])
@pytest.mark.parametrize("allow", [False, True])
def test_other_inputs_are_refused_even_where_changes_are_allowed(stopped, settings, key, what, allow):
    edit_manifest(stopped, key, "0" * 64)
    with pytest.raises(UsageError, match=f"started with another {what}"):
        run_recipe(load_recipe("inheritune-mini", settings), stopped, allow_change=allow)
    assert read_json(stopped / "status.json")["step"] == 3
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-00000003"]


@pytest.mark.parametrize("change", [{"checkpoint.keep": 1}, {"checkpoint.every": 1}, {"checkpoint.keep_every": 1}])
def test_how_often_it_saves_may_change_without_the_flag(stopped, settings, whole, change, capsys):
    result = run_recipe(load_recipe("inheritune-mini", settings | change), stopped)
    assert result["domains"] == whole["domains"]
    assert next(iter(change)) in capsys.readouterr().err
    kept = {"checkpoint.keep": [3, 5], "checkpoint.every": [3, 4, 5], "checkpoint.keep_every": [3, 4, 5]}
    steps = sorted(int(path.name.removeprefix("step-")) for path in (stopped / "checkpoints").iterdir())
    assert steps == kept[next(iter(change))]
    run_recipe(load_recipe("inheritune-mini", settings | change), stopped)  # and is what it is compared with now


def test_another_learning_rate_is_refused_by_name_without_the_flag(stopped, settings, whole):
    other = load_recipe("inheritune-mini", settings | {"optimizer.lr": 1e-3})
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"optimizer\.lr \(0\.003 -> 0\.001\).*--allow-change") as caught:
        run_recipe(other, stopped)
    assert caught.value.exit_code == 2
    assert (stopped / "config.yaml").read_bytes() == before
    assert read_json(stopped / "status.json")["state"] == "stopped"
    result = run_recipe(other, stopped, allow_change=True)
    assert result["domains"] != whole["domains"]


def test_a_free_change_does_not_let_another_one_through(stopped, settings):
    both = load_recipe("inheritune-mini", settings | {"checkpoint.keep": 1, "optimizer.lr": 1e-3})
    with pytest.raises(UsageError, match=r"checkpoint\.keep .*optimizer\.lr"):
        run_recipe(both, stopped)


def test_the_step_in_the_status_is_the_newest_checkpoints_by_number(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    write_status(tmp_path, "stopped", 75, "")
    assert read_json(tmp_path / "status.json")["step"] == 1_000_000_000


def test_a_folder_that_somebody_put_beside_the_checkpoints_does_not_stop_the_status(tmp_path):
    for name in ("step-00000003", "step-best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    write_status(tmp_path, "stopped", 75, "")
    assert read_json(tmp_path / "status.json")["step"] == 3
