"""`scion export`: checkpoints as plain Hugging Face folders."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scionlm import api
from scionlm.core.errors import DataError, UsageError
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, data_folder):
    out = tmp_path_factory.mktemp("export") / "run"
    settings = {
        "source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": None, "data.seq_len": 24,
        "inherit.layers": 2, "train.steps": 6, "train.global_batch_tokens": 96, "train.precision": "fp32",
        "evaluate.tokens_per_domain": 100, "control": False, "checkpoint.every": 2, "checkpoint.keep": 3,
        "average.method": "ema", "average.decay": 0.5,
    }  # fmt: skip
    run_recipe(load_recipe("inheritune-mini", settings), out)
    return out


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def saved(run, step, name="weights"):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def same(folder, wanted) -> bool:
    found = weights(folder)
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_is_exported_as_it_is(run, tmp_path):
    api.export(run, tmp_path / "newest")
    api.export(run, tmp_path / "four", step=4)
    api.export(run / "checkpoints" / "step-00000004", tmp_path / "by-folder")
    assert same(tmp_path / "newest", saved(run, 6))
    assert same(tmp_path / "four", saved(run, 4))
    assert same(tmp_path / "by-folder", saved(run, 4))
    assert not same(tmp_path / "four", saved(run, 6))
    assert (tmp_path / "four" / "tokenizer.json").exists()


def test_the_last_checkpoints_are_averaged(run, tmp_path):
    api.export(run, tmp_path / "mean", last=3)
    parts = [saved(run, step) for step in (2, 4, 6)]
    found = weights(tmp_path / "mean")
    for name in parts[0]:
        mean = sum(part[name].double() for part in parts) / 3
        assert torch.allclose(found[name].double(), mean, atol=1e-7)
    assert not same(tmp_path / "mean", parts[-1])


def test_the_runs_own_average_is_what_it_exported_itself(run, tmp_path):
    api.export(run, tmp_path / "average", averaged=True)
    assert same(tmp_path / "average", saved(run, 6, "average"))
    assert same(run / "model", saved(run, 6, "average"))
    assert not same(run / "model", saved(run, 6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 5}, r"no checkpoint of step 5 \(has: 2, 4, 6\)"),
        ({"last": 4}, "there are 3 checkpoints"),
        ({"last": 2, "averaged": True}, "leave --last out"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_is_left(run, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        api.export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_and_a_damaged_checkpoint_are_named(run, tmp_path):
    with pytest.raises(UsageError, match="neither a run folder"):
        api.export(tmp_path, tmp_path / "out")
    path = run / "checkpoints" / "step-00000002" / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(DataError, match=r"damaged \(weights\.safetensors\)"):
            api.export(run, tmp_path / "out", step=2)
    finally:
        path.write_bytes(whole)
