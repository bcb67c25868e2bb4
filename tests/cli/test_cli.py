"""The command line as a user meets it: in a process of its own, with exit codes, stdout, stderr and speed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM

from factories import corpora_file
from scionlm.cli import main as cli
from scionlm.cli.commands import app
from spent import by_processes_that_ended


def scion(*arguments, cwd=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "scionlm", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), timeout=120,
    )  # fmt: skip


def in_process(capsys, *arguments):
    """Run a command without a process of its own; return (exit code, stdout, stderr)."""
    code = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


COMMANDS = list(typer.main.get_command(app).commands)
CONTRACT = [
    "demo", "inspect", "train-tokenizer", "prepare", "inherit", "analyze", "plan", "run", "evaluate", "fit-reference",
    "compare", "report", "presets",
]  # fmt: skip


def test_the_commands_are_those_of_the_contract_and_export():
    assert len(CONTRACT) == 13
    assert sorted(COMMANDS) == sorted([*CONTRACT, "export"])


def test_help_answers_within_half_a_second():
    times = []
    for _ in range(3):
        started = by_processes_that_ended()
        done = scion("--help")
        times.append(by_processes_that_ended() - started)
    assert done.returncode == 0
    assert min(times) < 0.5, times
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    code, out, _ = in_process(capsys, command, "--help")
    assert code == 0
    assert "Usage: scion " + command in out


def test_importing_the_command_line_loads_no_torch():
    code = (
        "import sys, scionlm.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_inspect_of_the_real_model_is_one_json_document():
    done = scion("inspect", "smollm2-135m", "--json")
    facts = json.loads(done.stdout)
    assert facts["format_version"] == 1
    assert facts["num_parameters"] == 134515008
    expected = {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected


def test_inspect_for_people_shows_shape_and_layers(capsys, tiny_folder):
    code, out, _ = in_process(capsys, "inspect", tiny_folder)
    assert code == 0
    assert "num_key_value_heads" in out
    assert "attention" in out


def test_inherit_writes_a_plain_hugging_face_folder(capsys, tiny_folder, tmp_path):
    code, out, _ = in_process(
        capsys, "inherit", tiny_folder, "--layers", 2, "--strategy", "spaced", "-o", tmp_path / "c"
    )
    assert code == 0
    assert "bitwise" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.config.num_hidden_layers == 2
    assert (tmp_path / "c" / "LICENSE").exists()
    assert (tmp_path / "c" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert json.loads((tmp_path / "c" / "provenance.json").read_text())["plan"]["keep"] == [0, 4]
    assert in_process(capsys, "inherit", tiny_folder, "--keep", "0-1,4", "-o", tmp_path / "d")[0] == 0
    assert in_process(capsys, "inherit", tmp_path / "d", "--layers", 3, "-o", tmp_path / "e")[0] == 0


def test_prepare_evaluate_run_report(capsys, tiny_folder, tmp_path):
    corpora = corpora_file(tmp_path / "text", tiny_folder)
    code, out, _ = in_process(capsys, "prepare", corpora, "-o", tmp_path / "data")
    assert code == 0
    assert "alpha" in out
    code, out, _ = in_process(capsys, "evaluate", tiny_folder, "--data", tmp_path / "data", "--seq-len", 32, "--json")
    losses = json.loads(out)["domains"]
    assert set(losses["alpha"]) >= {"nll", "perplexity", "bits_per_byte", "num_tokens"}
    code, out, _ = in_process(
        capsys, "evaluate", tiny_folder, "--data", tmp_path / "data", "--max-tokens", 50, "--per-document"
    )
    assert code == 0
    assert "bits per byte" in out
    run = tmp_path / "run"
    arguments = [
        "run", "inheritune-mini", f"source={tiny_folder}", f"data.dir={tmp_path / 'data'}", "data.seq_len=16",
        "data.mixture=null", "train.steps=3", "train.global_batch_tokens=64", "inherit.layers=2",
        "evaluate.tokens_per_domain=64", "-o", run,
    ]  # fmt: skip
    code, out, err = in_process(capsys, *arguments)
    assert code == 0, err
    assert "control after" in out
    assert (run / "report.html").stat().st_size > 5000
    assert in_process(capsys, "report", run, "-o", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = in_process(capsys, *arguments[:-2], "optimizer.lr=0.5", "-o", run)
    assert code == 2
    assert "optimizer.lr" in err


def test_presets_are_listed_and_printed(capsys, tmp_path):
    assert "inheritune-mini" in in_process(capsys, "presets")[1]
    code, out, _ = in_process(capsys, "presets", "inheritune-mini")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    code, _, err = in_process(capsys, "run", tmp_path / "mine.yaml", "inherit.layerz=3", "-o", tmp_path / "r")
    assert code == 2
    assert "did you mean 'layers'" in err


def test_a_plan_of_one_step_counts_like_people(capsys, tiny_folder):
    asked = [f"source={tiny_folder}", "data.dir=x", "inherit.layers=2", "train.steps=1"]
    code, out, _ = in_process(capsys, "plan", "inheritune-mini", *asked)
    assert (code, "in 1 step\n" in out) == (0, True), out
    code, out, _ = in_process(capsys, "plan", "inheritune-mini", *asked, "train.steps=2")
    assert (code, "in 2 steps\n" in out) == (0, True), out


@pytest.fixture
def broken(tmp_path, tiny_folder):
    """A folder of things that are wrong."""
    for name in ("cut", "garbage", "code", "thin"):
        shutil.copytree(tiny_folder, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"\xff" * 5000)
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    (tmp_path / "code" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (tmp_path / "thin" / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 1000)
    (tmp_path / "not.gguf").write_bytes(b"hello")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.yaml").write_text(f"tokenizer: {tiny_folder}\ndomains: {{a: {{paths: [empty.jsonl]}}}}\n")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "text.yaml").write_text(f"tokenizer: {tiny_folder}\ndomains: {{a: {{paths: [text.jsonl]}}}}\n")
    (tmp_path / "typo.yaml").write_text(f"tokenizer: {tiny_folder}\ndomians: {{}}\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("recipe: inheritune\n")
    return tmp_path


WRONG = [
    ("inspect ./missing", 2, "missing"),
    ("inspect missing", 2, "missing"),
    ("inspect org/unknown-model", 74, "hub"),
    ("inspect cut", 65, "model.safetensors"),
    ("inspect garbage", 65, "model.safetensors"),
    ("inspect code", 65, "auto_map"),
    ("inspect thin", 65, "thin/config.json: num_attention_heads is missing"),
    ("inherit thin --layers 2 -o out", 65, "thin/config.json: num_attention_heads is missing"),
    ("evaluate thin --data DATA", 65, "thin/config.json: num_attention_heads is missing"),
    ("analyze thin --data DATA -o out", 65, "thin/config.json: num_attention_heads is missing"),
    ("run continual source=thin data.dir=DATA train.steps=3 -o out", 65, "thin/config.json: num_attention_heads is"),
    ("inspect bad.gguf", 65, "bad.gguf"),
    ("inspect not.gguf", 65, "not.gguf"),
    ("inspect file", 2, "folder"),
    ("inherit TINY --layers 0 -o out", 2, "5 layers"),
    ("inherit TINY --layers -1 -o out", 2, "5 layers"),
    ("inherit TINY --layers 31 -o out", 2, "5 layers"),
    ("inherit TINY --keep 0-7 -o out", 2, "layer 5"),
    ("inherit TINY --layers two -o out", 2, "--layers"),
    ("inherit TINY --layers 2 --strategy frist -o out", 2, "did you mean 'first'"),
    ("inherit TINY -o out", 2, "layers"),
    ("inherit TINY --layers 2 -o full", 2, "not empty"),
    ("inherit TINY --layers 2 -o file/out", 74, "file"),
    ("inherit TINY --layers 2 -o /proc/scion/out", 74, "/proc"),
    ("inherit cut --layers 2 -o out", 65, "model.safetensors"),
    ("prepare empty.yaml -o out", 65, "no text"),
    ("prepare typo.yaml -o out", 2, "did you mean 'domains'"),
    ("prepare missing.yaml -o out", 2, "missing.yaml"),
    ("prepare full -o out", 2, "full is a folder; name a YAML file"),
    ("prepare text.yaml -o file", 2, "file exists and is not a folder"),
    ("train-tokenizer text.yaml --vocab-size 300 -o file", 2, "file"),
    ("evaluate TINY --data nowhere", 2, "scion prepare"),
    ("evaluate TINY --data full", 65, "index.json"),
    ("run inheritune-mnii", 2, "did you mean 'inheritune-mini'"),
    ("run ./nosuch.yaml", 2, "./nosuch.yaml: no such file"),
    ("plan nosuch.yml", 2, "nosuch.yml: no such file"),
    ("run no/such", 2, "no/such: no such file"),
    ("run begun", 2, "did you mean begun/config.yaml?"),
    ("run TINY", 2, "is a model; use source="),
    ("run full", 2, "full is a folder, not a recipe"),
    ("plan sweep", 2, "a sweep needs a YAML file"),
    ("run something", 2, "recipes are inheritune, shear, continual, scratch (see: scion presets)"),
    ("run inheritune-mini optimizer.lr=0", 2, "optimizer.lr"),
    ("run inheritune-mini source=./missing -o out", 2, "missing"),
    ("run inheritune-mini -o full", 2, "not empty"),
    ("run inheritune-mini data.dir= -o out", 2, "data.dir is empty"),
    ("run inheritune-mini -o /proc/scion/out", 74, "/proc"),
    ("report nowhere", 2, "nowhere"),
    ("compare TINY -o out", 2, "--data"),
    ("compare nowhere --data full -o out", 2, "nowhere"),
    ("compare TINY --data nowhere -o out", 2, "scion prepare"),
    ("compare TINY --data full -o file", 2, "not a folder"),
    ("compare TINY --data full --max-tokens 0 -o out", 2, "--max-tokens"),
    ("compare full --data full -o out", 65, "config.json"),
    ("compare -o out", 2, "RUN_OR_MODEL"),
    ("compare TINY", 2, "--out"),
    ("run strategies-mini runs.frist.seed=1 -o out", 2, "did you mean 'first'"),
    ("run strategies-mini optimizer.lr=0 -o out", 2, "run 'first': optimizer.lr"),
    ("plan strategies-mini --calibrate", 2, "--calibrate"),
    ("plan strategies-mini --find-lr", 2, "--find-lr"),
    ("plan inheritune-mini source=TINY inherit.layers=2 --find-lr", 2, "set data.dir=FOLDER"),
    ("presets inheritune-mani", 2, "did you mean"),
    ("frobnicate", 2, "frobnicate"),
    ("inspect --frobnicate x", 2, "frobnicate"),
    ("inspect", 2, "model"),
]


@pytest.mark.parametrize(("command", "code", "words"), WRONG, ids=[case[0] for case in WRONG])
def test_bad_input_gives_its_exit_code_one_clear_message_and_leaves_nothing(
    broken, tiny_folder, data_folder, capsys, monkeypatch, tmp_path_factory, command, code, words
):
    monkeypatch.chdir(broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    before = sorted(str(path) for path in broken.rglob("*"))
    started = time.process_time()
    command = command.replace("TINY", str(tiny_folder)).replace("DATA", str(data_folder.path))
    found, out, err = in_process(capsys, *command.split())
    seconds = time.process_time() - started
    assert found == code, err
    assert words in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) <= 2, err
    assert "Traceback" not in err + out
    assert seconds < 5
    assert sorted(str(path) for path in broken.rglob("*")) == before
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors"))


def test_a_message_comes_with_a_traceback_only_on_demand(capsys):
    assert "Traceback" in in_process(capsys, "inspect", "./missing", "--debug")[2]


def test_a_fault_of_ours_exits_one(capsys, monkeypatch):
    import scionlm.cli.inspect

    monkeypatch.setattr(scionlm.cli.inspect, "inspect_model", lambda name: 1 // 0)
    code, _, err = in_process(capsys, "inspect", "x")
    assert (code, "fault in Scion" in err) == (1, True)


def test_terminating_a_real_process_saves_and_the_same_command_goes_on(tiny_folder, data_folder, tmp_path):
    arguments = [
        "run", "inheritune-mini", f"source={tiny_folder}", f"data.dir={data_folder.path}", "data.mixture=null",
        "data.seq_len=24", "train.steps=400", "train.global_batch_tokens=96", "inherit.layers=2", "control=false",
        "evaluate.tokens_per_domain=64", "-o", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "scionlm", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("train/nll") > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "to go on: scion run inheritune-mini" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    done = scion(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def test_two_processes_cannot_have_one_run_folder(tiny_folder, data_folder, tmp_path, capsys):
    from scionlm.core.files import folder_lock

    run = tmp_path / "run"
    run.mkdir()
    with folder_lock(run):
        (run / "status.json").write_text('{"format_version": 1, "state": "running"}')
        done = scion("run", "inheritune-mini", f"source={tiny_folder}", f"data.dir={data_folder.path}", "-o", run)
    assert done.returncode == 2
    assert "another scion process" in done.stderr
    assert (run / "status.json").exists(), "the second process must not clear what the first one holds"


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_with_the_same_bits(tiny_folder, data_folder, tmp_path, capsys):
    arguments = [
        "run", "inheritune-mini", f"source={tiny_folder}", f"data.dir={data_folder.path}", "data.mixture=null",
        "data.seq_len=24", "train.steps=60", "train.global_batch_tokens=96", "inherit.layers=2", "control=false",
        "evaluate.tokens_per_domain=64", "checkpoint.every=3", "-o",
    ]  # fmt: skip
    assert in_process(capsys, *arguments, tmp_path / "whole")[0] == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kills = 0
    for target in (8, 40):
        process = subprocess.Popen(
            [sys.executable, "-m", "scionlm", *arguments, str(tmp_path / "killed")],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("train/nll") >= target):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    done = scion(*arguments, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    name = "model/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow  # tests/surgery/test_write.py has it in a fork, of a tiny model
def test_terminated_while_it_writes_inherit_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "scionlm", "inherit", "smollm2-135m", "--layers", "25", "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob(".out.*.tmp")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert not list(tmp_path.iterdir())


def test_a_small_vocabulary_from_the_first_command_to_a_data_folder(capsys, tmp_path, tiny_folder):
    """The tour: a tokenizer of one's own, text prepared with it, the page; twice, and the second time is a no-op."""
    corpora = corpora_file(tmp_path, tiny_folder)
    code, out, err = in_process(capsys, "train-tokenizer", corpora, "--vocab-size", 300, "-o", tmp_path / "tok")
    assert code == 0
    assert "warning" not in err
    assert "300 tokens" in out
    code, _, err = in_process(capsys, "train-tokenizer", corpora, "--vocab-size", 5000, "-o", tmp_path / "large")
    assert (code, "vocab_size 5,000 is not reached: the text gives" in err) == (0, True), err
    own = tmp_path / "own.yaml"
    own.write_text(corpora.read_text().replace(str(tiny_folder), str(tmp_path / "tok")) + "dedupe: exact\n")
    for _ in range(2):
        code, out, err = in_process(capsys, "prepare", own, "-o", tmp_path / "data")
        assert code == 0
        assert f"page: {tmp_path / 'data' / 'report.html'}" in out
    assert "prepared already" in err
    page = (tmp_path / "data" / "report.html").read_text()
    assert "alpha" in page
    code, _, err = in_process(capsys, "train-tokenizer", corpora, "--vocab-size", 300, "-o", tmp_path / "tok")
    assert code == 2
    assert "not empty" in err


def test_under_torchrun_one_rank_prints_the_table(capsys, tmp_path, tiny_folder, monkeypatch):
    corpora = corpora_file(tmp_path, tiny_folder)
    monkeypatch.setenv("RANK", "1")
    assert in_process(capsys, "prepare", corpora, "-o", tmp_path / "data")[:2] == (0, "")


def test_scion_alone_prints_its_help_and_no_error(capsys):
    code, _, err = in_process(capsys)
    assert code == 2
    assert "Usage: scion" in err
    assert "error:" not in err
    assert "see scion --help" not in err
