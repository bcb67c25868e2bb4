"""`scion analyze` as a user meets it: flags, exit codes, stdout, stderr, and signals to a real process."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from factories import model_folder
from scionlm.analysis import forward, gradients, removal
from scionlm.cli import main as cli
from scionlm.report import analysis_figures
from scionlm.surgery.indices import parse_indices
from scionlm.surgery.plan import SurgeryPlan
from spent import by_processes_that_ended

SMALL = "--seq-len 16 --num-sequences 6 --loss-sequences 3"
LINE = f"analyze tiny --data data {SMALL} -o out"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder, data_folder):
    """A folder with models and data, good and bad, that no test changes."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(data_folder.path, root / "data")
    for name in ("tiny", "nan", "tokens"):
        shutil.copytree(tiny_folder, root / name)
    model_folder(root / "other", num_hidden_layers=3, seed=5)
    model_folder(root / "short", max_position_embeddings=8)
    state = load_file(tiny_folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, root / "nan" / "model.safetensors", {"format": "pt"})
    spec = json.loads((tiny_folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 320, "content": "<|more|>"})
    (root / "tokens" / "tokenizer.json").write_text(json.dumps(spec))
    (root / "full").mkdir()
    (root / "full" / "thesis.txt").write_text("years of work")
    (root / "file").write_text("x")
    before = contents(root)
    yield root
    assert contents(root) == before


@pytest.fixture
def scion(capsys, monkeypatch, tmp_path, place):
    """Run a command line where the models are within reach; return (exit code, stdout, stderr)."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def run(line):
        code = cli.run(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def contents(folder):
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.name != ".lock"]
    return {path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns) for path in paths}


def timeless(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def process(folder, line, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "scionlm", *shlex.split(line)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_with_json_stdout_is_one_document_and_the_one_that_is_written(scion):
    code, out, err = scion(f"{LINE} --greedy 2 --json")
    assert code == 0, err
    record = json.loads(out)
    assert record == json.loads(Path("out/analysis.json").read_text())
    assert next(iter(record)) == "format_version"
    wanted = {"format_version": 1, "seq_len": 16, "num_sequences": 6, "tau": 0.9, "eta": 0.9}
    assert {key: record[key] for key in wanted} == wanted
    keys = {"index", "max_rank", "mean_mass", "lazy", "rank1_head_ratio", "block_influence"}
    assert [layer["index"] for layer in record["layers"]] == list(range(5))
    assert all(keys <= layer.keys() for layer in record["layers"])
    assert err.splitlines() == ["tiny: 6 x 16 tokens from data"]
    code, again, _ = scion(f"{LINE} --greedy 2 --json")
    assert (code, json.loads(again)) == (0, record), "what is there is not measured again"


def test_the_same_command_again_writes_the_same_bytes(scion):
    assert scion(LINE)[0] == 0
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for _ in range(4):
        assert scion(LINE)[0] == 0
        assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == files


def test_for_people_there_are_tables_and_where_the_rest_is(scion):
    code, out, err = scion(f"{LINE} --greedy 2 --layers 3")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "tiny: 5 layers, 6 sequences of 16 tokens"
    assert "MaxRank" in lines[1]
    assert [line.split()[0] for line in lines[2:7]] == list("01234")
    assert "what to keep" in out
    assert "rank correlation with removal:" in out
    assert "side by side" not in out
    assert lines[-1] == "out/report.html"
    assert Path("out/report.html").read_text().startswith("<!DOCTYPE html>")
    for by in ("first", "removal", "greedy"):
        row = next(line.split() for line in lines if line.startswith(by))
        assert row[1] == "3"
        assert len(parse_indices(row[2], 5)) == 3
    code, out, _ = scion(f"{LINE} --against other")
    assert code == 0
    assert "side by side" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("other")] == [["other", "3"]]


def test_names_with_markup_are_printed_as_they_are(scion, place):
    for name in ("[red]x[/red]", "<b>&amp;"):
        shutil.copytree(place / "tiny", name)
        code, out, err = scion(f"analyze '{name}' --data data {SMALL} -o '{name}[out]' --against '{name}'")
        assert code == 0, err
        assert out.startswith(f"{name}: 5 layers")
        assert [line for line in out.splitlines() if line.startswith(f"{name} ")]
        assert out.endswith(f"{name}[out]/report.html\n")
        assert err.startswith(f"{name}: ")
        assert "<b>&amp;:" not in Path(f"{name}[out]/report.html").read_text()


def test_what_it_finds_is_what_inherit_takes(scion):
    assert scion(f"{LINE} --greedy 2 --layers 3")[0] == 0
    record = json.loads(Path("out/analysis.json").read_text())
    code, _, err = scion("inherit tiny --scores out/analysis.json --layers 3 -o by-scores")
    assert code == 0, err
    kept = SurgeryPlan.from_dict(json.loads(Path("by-scores/provenance.json").read_text())["plan"]).keep
    by = {each["by"]: each["keep"] for each in record["suggestions"]}
    assert list(kept) == parse_indices(by[record["layer_scores_by"]], 5)
    for name, keep in by.items():
        code, out, err = scion(f"inherit tiny --keep {keep} --dry-run --json")
        assert code == 0, f"{name}: {err}"
        assert json.loads(out)["plan"]["keep"] == parse_indices(keep, 5)
    layers = {each["by"]: each["num_layers"] for each in record["suggestions"]}
    assert {layers[name] for name in ("first", "removal", "taylor", "greedy", "angular_block")} == {3}


def test_every_flag_gets_through(scion):
    code, out, err = scion(
        "analyze tiny --data data -o out --seq-len 20 --num-sequences 4 --loss-sequences 2 --layers 2 --greedy 1 "
        "--tau 0.5 --eta 0.6 --length 5 --length 9 --lazy-tolerance 0.25 --domain beta --split held_out --exact "
        "--precision bf16 --stream --seed 7 --against other --json"
    )
    assert code == 0, err
    record = json.loads(out)
    wanted = {
        "seq_len": 20, "num_sequences": 4, "loss_sequences": 2, "tau": 0.5, "eta": 0.6, "lazy_tolerance": 0.25,
        "exact": True, "precision": "bf16", "seed": 7,
    }  # fmt: skip
    assert {key: record[key] for key in wanted} == wanted
    assert [each["seq_len"] for each in record["lengths"]] == [5, 9, 20]
    assert [each["name"] for each in record["domains"]] == ["beta"]
    assert record["data"]["split"] == "held_out"
    assert len(record["greedy"]["order"]) == 1
    assert record["suggestions"][0]["num_layers"] == 2
    assert record["against"]["model"]["name"] == "other"
    assert "read layer by layer" in err


def test_figures_are_written_on_demand(scion, monkeypatch):
    monkeypatch.setattr(analysis_figures, "_saved", lambda figure, kind, metadata: kind.encode())  # no pixels
    code, _, err = scion(f"{LINE} --greedy 2 --against other")
    assert code == 0, err
    assert not Path("out/figures").exists()
    code, out, err = scion(f"{LINE} --greedy 2 --against other --plots --json")
    assert code == 0, err
    assert json.loads(out) == json.loads(Path("out/analysis.json").read_text())
    written = {path.name for path in Path("out/figures").iterdir()}
    assert written == {f"{name}.{kind}" for name in analysis_figures.PLOTS for kind in ("svg", "png")}


def test_without_matplotlib_that_is_said_before_anything_is_measured(scion, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = scion(f"{LINE} --plots")
    assert (code, out) == (2, "")
    assert "pip install 'scionlm[plots]'" in err
    assert not Path("out").exists()
    assert scion(LINE)[0] == 0


def test_layers_greedy_and_tolerance_may_change_in_the_same_folder_and_nothing_else(scion):
    assert scion(LINE)[0] == 0
    for flags in ("--layers 1", "--greedy 1", "--lazy-tolerance 2", "--layers 4 --stream", ""):
        assert scion(f"{LINE} {flags}")[0] == 0, flags
    before = contents("out")
    for flag, name in {
        "--seq-len 17": "seq_len", "--tau 0.8": "tau", "--eta 0.8": "eta", "--seed 1": "seed",
        "--domain beta": "domains", "--split held_out": "split", "--exact": "exact",
        "--precision bf16": "precision", "--length 3": "lengths",
    }.items():  # fmt: skip
        code, out, err = scion(f"{LINE} {flag}")
        assert (code, out, f"another {name} (" in err, "choose another folder" in err) == (2, "", True, True), err
    code, _, err = scion(LINE.replace("tiny", "other"))
    assert (code, "another model (" in err) == (2, True), err
    assert contents("out") == before


def test_help_answers_within_half_a_second_and_names_every_flag(scion):
    times = []
    for _ in range(3):
        started = by_processes_that_ended()
        done = subprocess.run([sys.executable, "-m", "scionlm", "analyze", "--help"], capture_output=True, text=True)
        times.append(by_processes_that_ended() - started)
    assert done.returncode == 0
    assert min(times) < 0.5, times
    for flag in ("--data", "-o", "--against", "--greedy", "--plots", "--json", "--no-stream", "--lazy-tolerance"):
        assert flag in done.stdout


WRONG = [
    ("analyze tiny -o out", 2, "--data"),
    ("analyze tiny --data data", 2, "--out"),
    ("analyze --data data -o out", 2, "model"),
    (f"{LINE} --tua 0.5", 2, "--tua"),
    (f"{LINE} --seq-len many", 2, "--seq-len"),
    (LINE.replace("tiny", "./missing"), 2, "missing"),
    (LINE.replace("tiny", "file"), 2, "folder"),
    (LINE.replace("tiny", "org/unknown-model"), 74, "hub"),
    (LINE.replace("--data data", "--data nowhere"), 2, "scion prepare"),
    (LINE.replace("--data data", "--data full"), 65, "index.json"),
    (LINE.replace("--data data", "--data file"), 2, "scion prepare"),
    (f"{LINE} --domain alfa", 2, "did you mean 'alpha'"),
    (f"{LINE} --split trian", 2, "held_out"),
    (f"{LINE} --seq-len 1", 2, "seq_len"),
    (f"{LINE} --seq-len 129", 2, "seq_len 129: it must lie between 2 and 128"),
    (f"{LINE} --num-sequences 0", 2, "num_sequences"),
    (f"{LINE} --num-sequences 2", 2, "loss_sequences 3: it must lie between 1 and 2"),
    (f"{LINE} --loss-sequences 0", 2, "loss_sequences"),
    (f"{LINE} --tau 0", 2, "tau"),
    (f"{LINE} --tau 1.5", 2, "tau"),
    (f"{LINE} --tau nan", 2, "tau"),
    (f"{LINE} --eta 0", 2, "eta"),
    (f"{LINE} --length 17", 2, "length 17"),
    (f"{LINE} --lazy-tolerance inf", 2, "lazy_tolerance"),
    (f"{LINE} --greedy 5", 2, "greedy 5: it must lie between 0 and 4"),
    (f"{LINE} --greedy -1", 2, "greedy"),
    (f"{LINE} --layers 0", 2, "layers"),
    (f"{LINE} --layers 6", 2, "layers 6: it must lie between 1 and 5"),
    (f"{LINE} --precision fp23", 2, "'fp32'"),
    (f"{LINE} --seed -1", 2, "seed"),
    (f"{LINE} --seq-len 100 --num-sequences 500", 65, "domain 'alpha'"),
    (LINE.replace("tiny", "tokens"), 65, "prepare it again with tokenizer"),
    (LINE.replace("tiny", "nan"), 65, "broken"),
    (LINE.replace("tiny", "short"), 2, "seq_len 16: it must lie between 2 and 8"),
    (LINE.replace("out", "full"), 2, "not empty"),
    (LINE.replace("out", "tiny"), 2, "not empty"),
    (LINE.replace("out", "file"), 2, "file"),
    (LINE.replace("out", "file/out"), 74, "a part of the path is a file"),
    (LINE.replace("-o out", "-o /proc/scion/out"), 74, "/proc"),
    (f"{LINE} --against ./missing", 2, "missing"),
    (f"{LINE} --against tokens", 65, "prepare it again with tokenizer"),
    (f"{LINE} --against short", 2, "seq_len 16"),
    (f"{LINE} --against full", 65, "config.json"),
]


SAID = [("", *case) for case in WRONG] + [("--json", *case) for case in WRONG[::10]]


@pytest.mark.parametrize(
    ("flags", "line", "code", "words"), SAID, ids=[f"{case[0]} {case[1]}".replace(SMALL, "...") for case in SAID]
)
def test_what_is_wrong_is_one_message_a_code_and_nothing_left(scion, tmp_path, flags, line, code, words):
    before = contents(tmp_path)
    started = time.process_time()
    found, out, err = scion(f"{line} {flags}")
    seconds = time.process_time() - started
    assert (found, out) == (code, ""), err
    message = [text for text in err.splitlines() if " tokens from " not in text]
    assert message[0].startswith("error: ")
    assert len(message) <= 2, err
    assert words in err
    assert "Traceback" not in err
    assert seconds < 5
    assert contents(tmp_path) == before


def test_a_wrong_request_loads_no_torch(place):
    code = (
        "import sys; from scionlm.cli.main import run; "
        "found = [run(['analyze', *line.split()]) for line in ("
        "'missing --data data -o out', 'tiny --data nowhere -o out', 'tiny --data data -o out --layers 9', "
        "'tiny --data data -o full --seq-len 16 --num-sequences 6')]; "
        "sys.exit(found != [2, 2, 2, 2] or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (forward, "forward_pass", signal.SIGTERM),
        (forward, "forward_pass", signal.SIGINT),
        (gradients, "gradient_pass", signal.SIGTERM),
        (removal, "removal_losses", signal.SIGTERM),
        (removal, "lens_losses", signal.SIGTERM),
    ],
)
def test_stopped_by_a_signal_it_says_so_and_the_same_command_finishes(scion, monkeypatch, module, name, number):
    original = getattr(module, name)

    def signalled(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        code, out, err = scion(f"{LINE} --json")
    assert (code, out) == (75, ""), err
    assert "same command goes on" in err
    assert not Path("out/analysis.json").exists()
    code, out, err = scion(f"{LINE} --json")
    assert code == 0, err
    _, whole, _ = scion(f"{LINE.replace('-o out', '-o whole')} --json")
    assert timeless(json.loads(out)) == timeless(json.loads(whole))


def test_a_real_process_is_terminated_killed_and_finishes(scion, place, tmp_path):
    line = (
        "analyze tiny --data data -o out --seq-len 64 --num-sequences 160 --loss-sequences 160 --greedy 4 "
        "--length 16 --json"
    )
    arrays = tmp_path / "out" / "arrays"

    def interrupt(part, number):
        running = process(tmp_path, line)
        deadline = time.monotonic() + 60
        while not (arrays / f"{part}.safetensors").exists():
            assert time.monotonic() < deadline
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.01)
        running.send_signal(number)
        return running.communicate(timeout=60), running.returncode

    (out, err), code = interrupt("forward", signal.SIGTERM)
    assert (code, out) == (75, ""), err
    assert err.rstrip().splitlines()[-1].startswith("stopped; ")
    kept = contents(arrays)
    assert not list(tmp_path.rglob("*.tmp"))
    assert interrupt("lens", signal.SIGKILL)[1] == -signal.SIGKILL
    code, out, err = scion(line)
    assert code == 0, err
    assert {path: contents(arrays)[path] for path in kept if path.is_file()} == {
        path: state for path, state in kept.items() if path.is_file()
    }
    whole = json.loads(scion(line.replace("-o out", "-o whole"))[1])
    assert timeless(json.loads(out)) == timeless(whole)


def test_two_processes_in_one_folder_do_each_other_no_harm(scion, tmp_path):
    both = [process(tmp_path, f"{LINE} --greedy 4 --json") for _ in range(2)]
    ends = [(*each.communicate(timeout=90), each.returncode) for each in both]
    assert {code for _, _, code in ends} <= {0, 2}
    assert 0 in [code for _, _, code in ends]
    whole = json.loads(scion(f"{LINE.replace('-o out', '-o whole')} --greedy 4 --json")[1])
    for out, err, code in ends:
        if code:
            assert "in use by another scion process" in err or "not empty" in err, err
            assert out == ""
        else:
            assert timeless(json.loads(out)) == timeless(whole)
    assert timeless(json.loads(Path("out/analysis.json").read_text())) == timeless(whole)
    assert not [path for path in Path("out").rglob("*.tmp")]
