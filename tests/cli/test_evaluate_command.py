"""`scion evaluate`: what it measures, how it fails, and how fast a model is."""

import json
import shutil

import pytest
import torch

from evaluation_texts import task_folder, written_data
from factories import tiny_model
from scionlm.cli.main import run as scion
from scionlm.evaluation.generate import write_samples
from scionlm.evaluation.inference import inference_speed, kv_cache_bytes
from scionlm.sources import load_tokenizer, resolve


def test_tasks_need_no_data_and_the_json_is_one_document(tmp_path, tiny_folder, capsys):
    folder = task_folder(tmp_path / "t")
    code = scion(["evaluate", str(tiny_folder), "--tasks", "fruit", "--tasks-dir", str(folder), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(shown.out)
    assert found["domains"] == {}
    record = found["tasks"]["fruit"]
    assert {"acc", "acc_stderr", "acc_norm", "num_items", "num_fewshot", "version", "config_sha256"} <= set(record)
    assert found["lm_eval"]["fewshot_seed"] == 1234
    assert found["sha256"] == resolve(str(tiny_folder)).weights_fingerprint()
    assert found["versions"]["lm_eval"] == found["lm_eval"]["version"]
    assert (found["device"] != "", found["settings"]) == (True, {})
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        ([], 2, "nothing to measure"),
        (["--suite", "offline"], 2, "give --data"),
        (["--suite", "sheard"], 2, "did you mean 'sheared'"),
        (["--tasks", ","], 2, "names no task"),
        (["--batch-size", "many", "--speed"], 2, "--batch-size many"),
        (["--tasks-dir", "/no/such/folder"], 2, "does not exist"),
        (["--limit", "0", "--speed"], 2, "limit"),
        (["--allow-task-code", "--speed"], 2, "--allow-task-code"),
    ],
)
def test_wrong_requests_are_one_line(tiny_folder, capsys, flags, code, word):
    assert scion(["evaluate", str(tiny_folder), *flags]) == code
    shown = capsys.readouterr()
    assert word in shown.err
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) <= 2


def test_task_code_ends_with_2_and_missing_data_with_74(tmp_path, tiny_folder, capsys):
    folder = task_folder(tmp_path / "code", doc_to_text="x")
    (folder / "more.yaml").write_text("task: more\ndoc_to_text: !function a.b\n")
    assert scion(["evaluate", str(tiny_folder), "--tasks-dir", str(folder)]) == 2
    assert "--allow-task-code" in capsys.readouterr().err
    folder = task_folder(tmp_path / "offline", dataset_path="no-such/data-set", dataset_kwargs={})
    assert scion(["evaluate", str(tiny_folder), "--tasks", "fruit", "--tasks-dir", str(folder)]) == 74
    assert "--suite offline" in capsys.readouterr().err


def test_speed_is_measured_with_its_settings(tiny_folder, capsys):
    assert scion(["evaluate", str(tiny_folder), "--speed", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["inference"]
    assert speed["prefill_tokens_per_second"] > 0
    assert speed["decode_tokens_per_second"] > 0
    assert speed["settings"]["statistic"] == "median"


def test_a_model_of_few_positions_reads_and_writes_no_further(data_folder):
    model = tiny_model("gpt2", n_positions=16)
    found = inference_speed(model, repeats=1)
    assert (found["settings"]["prompt_tokens"], found["settings"]["new_tokens"]) == (8, 8)
    tokenizer = load_tokenizer(data_folder.tokenizer_folder)
    (sample,) = write_samples(model, tokenizer, [(data_folder, data_folder.domains[0])], seed=0)
    assert sample["prompt"]


def test_windows_beyond_learned_positions_are_refused_and_beyond_others_named(tmp_path, tiny_folder, capsys):
    folder = tmp_path / "few"
    shutil.copytree(tiny_folder, folder)
    tiny_model("gpt2", n_positions=16).save_pretrained(folder)
    data = written_data(tmp_path / "w", tiny_folder)
    assert scion(["evaluate", str(folder), "--data", str(data.path), "--seq-len", "17"]) == 2
    assert "--seq-len 17" in capsys.readouterr().err
    limit = tiny_model().config.max_position_embeddings
    flags = ["--data", str(data.path), "--seq-len", str(limit + 1), "--max-tokens", "8"]
    assert scion(["evaluate", str(tiny_folder), *flags]) == 0
    assert f"longer than the {limit} positions" in capsys.readouterr().err


def test_speed_is_what_the_clock_says():
    ticks = iter(n * 0.5 for n in range(100))
    model = tiny_model()
    found = inference_speed(model, prompt_tokens=16, new_tokens=4, repeats=3, clock=lambda: next(ticks))
    assert found["time_to_first_token_seconds"] == 0.5
    assert (found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) == (32.0, 8.0)
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["weight_bytes"] == 4 * found["num_parameters"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen2", "gemma2"])
@torch.no_grad()
def test_cache_bytes_are_those_of_the_cache_itself(model_type):
    model = tiny_model(model_type)
    cache = model(input_ids=torch.arange(1, 6)[None], use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert kv_cache_bytes(model.config, 4)["kv_cache_bytes_per_token"] == held / 5


def test_sliding_windows_are_told():
    assert kv_cache_bytes(tiny_model("mistral", sliding_window=8).config, 2)["window_layers"] == 5
    found = kv_cache_bytes(tiny_model("gemma2").config, 2)
    assert (found["window_layers"], found["window"]) == (2, 8)
    assert kv_cache_bytes(tiny_model("llama").config, 2)["window"] is None


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, tiny_folder, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.json", tmp_path / "file" / "folder"):
        assert scion(["evaluate", str(tiny_folder), "--speed", "-o", str(out)]) == 74
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "file" in shown.err
