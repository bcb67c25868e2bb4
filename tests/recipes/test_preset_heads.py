"""What the heads of presets say: plans that anybody can make before the text is there, and budgets that it has."""

import json
import re
import shlex

import pytest

from scionlm.cli import main as cli
from scionlm.core.config import parse_yaml, validate
from scionlm.data.reading.corpora import Corpora
from scionlm.recipes import origin
from scionlm.recipes.config_sweep import load_request
from scionlm.recipes.model_shapes import model_config
from scionlm.recipes.presets import preset_corpora, preset_names, preset_text
from scionlm.sources import open_folder

LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
SOURCES = {
    "EleutherAI/pythia-410m": model_config({"shape": "pythia-410m", "vocab_size": 50304}),
    "meta-llama/Llama-2-7b-hf": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "meta-llama/Meta-Llama-3-8B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "openlm-research/open_llama_3b": LLAMA | {
        "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32,
    },
    "Qwen/Qwen3-4B-Base": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""What `config.json` on the hub says of the sizes of each source."""


def head(name):
    """Return the head comment of a preset, as one line."""
    lines = [line.lstrip("# ") for line in preset_text(name).splitlines() if line.startswith("#")]
    return " ".join(lines)


COMMANDS = [
    (name, command)
    for name in preset_names()
    for command in re.findall(rf"`(scion plan {re.escape(name)}[^`]*)`", head(name))
]


def test_every_preset_of_a_paper_says_how_to_plan_it():
    papers = {name for name in preset_names() if "# Corpora" in preset_text(name)}
    assert papers <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_plan_that_a_head_names_needs_no_text(name, command, tmp_path, monkeypatch, capsys):
    def resolved(source, **_):
        folder = tmp_path / source.partition("@")[0].replace("/", "-")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SOURCES[source.partition("@")[0]]))
        return open_folder(folder, source)

    monkeypatch.setattr(origin, "resolve", resolved)
    monkeypatch.chdir(tmp_path)
    assert cli.run(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "device hours" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["continual-replay-weak", "continual-replay-strong"])
def test_a_union_may_replay_more_than_its_folder_has(name):
    (union,) = [run.recipe for run in load_request(name).chosen if run.name == "union"]
    assert union.replay.fraction * union.total_tokens >= 299.9e9
    assert union.replay.repeat


def test_thirds_of_one_text_have_none_of_it_in_common():
    corpora = validate(Corpora, parse_yaml(preset_corpora("continual-infinite"), "corpora"), "corpora")
    held_out = corpora.held_out.fraction
    there = (1 - held_out) * sum(domain.max_tokens for domain in corpora.domains.values())
    assert {run.name for run in load_request("continual-infinite").chosen if run.recipe.total_tokens > there} == set()


@pytest.mark.parametrize("name", [name for name in preset_names() if re.match(r"inheritune-(gpt2|fineweb)", name)])
def test_what_a_head_says_of_random_weights_is_made(name):
    assert load_request(name).control
