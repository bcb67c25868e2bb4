"""Every command of a page is run, in its order, in the small world, and every recipe too, on fewer tokens.

Presets, which bring their own text, are planned instead, as are the commands of results, which train real models.
"""

import json
import re
import shlex
import shutil

import pytest

import scionlm
from scionlm.cli.main import run as run_scion
from scionlm.planning.range_curve import range_rates
from scionlm.recipes.presets import preset_names
from scripts import load_script
from whole_runs import quicken

docs = load_script("tools/check_docs.py")
SMALL = {
    "train.global_batch_tokens": 96,
    "data.seq_len": 24,
    "train.precision": "fp32",
    "evaluate.tokens_per_domain": 48,
    "evaluate.every": 0.9,
}
TOKENS = r"\b((?<!global_batch_)tokens[:=] ?)[\d.]+[kMB]\b"
NOT_HERE = {
    "RECIPE": "a word that the reader fills in",
    "...": "a word that the reader fills in",
    "MODEL": "a word that the reader fills in",
    "meta-llama/": "a model of the hub",
    "shear-llama2": "a model of the hub",
    "shear-mini": "a target of the real model's size",
    "--suite sheared": "a data set of the hub",
    "--tasks piqa": "a data set of the hub",
    "$SCRATCH": "a cluster",
}
"""What keys and flags alone are checked of (tools/check_docs.py), and what it needs."""
ELSEWHERE = {"docs/start.md", "docs/contributing.md", "docs/changelog.md"}
"""test_snippets runs the first one whole; the others are copies."""


def _page_names():
    for path in docs.documents():
        name = str(path.relative_to(docs.ROOT))
        if name not in ELSEWHERE and not name.startswith(("docs/results/", "docs/decisions/", "docs/reference/")):
            yield name


def _steps(path):
    """Give a page's files, as name and text, and its commands."""
    text = path.read_text()
    for block in docs.snippets(text):
        if block.language == "yaml" and re.search(r"^(domains|recipe):", block.text, re.M):
            sweep = re.search(r"^recipe: sweep", block.text, re.M)
            name = "CORPORA.yaml" if "domains:" in block.text.split("recipe:")[0] else "recipe.yaml"
            name = "sweep.yaml" if sweep else name
            yield name, block.text
            if name != "CORPORA.yaml":
                yield None, f"scion plan {name}"
                if not re.search(rf"scion run {re.escape(name)}\b", text):  # else the page itself runs it
                    yield None, f"scion run {name} -o ran"
        elif block.language == "csv":
            yield "losses.csv", block.text
        elif not block.language:
            for _, line in docs.command_lines(block.text):
                command = re.sub(r"^torchrun .* -m scionlm ", "scion ", re.sub(r"\s+#.*", "", line))
                if command.startswith("scion ") and not any(word in command for word in NOT_HERE):
                    yield None, command


NARROW = {"hidden_size": 16, "intermediate_size": 43, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALLER = {
    r"((?:hidden|intermediate)[-_]size[ :=]+)(\d+)": lambda found: f"{found[1]}{int(found[2]) // 16}",
    r"scion run inheritune-taught ": "scion run inheritune-taught inherit.intermediate_size=55 ",
    r"--vocab-size \d+": "--vocab-size 300",
    r"(parameters[:=] ?)60M": r"\g<1>200k",
    r"--max-tokens \d+": "--max-tokens 256 --seq-len 64",
    r"scion analyze (.*)": r"scion analyze \1 --num-sequences 3 --loss-sequences 1",
    r"--suite offline": "--suite offline --limit 12",
    r"HuggingFaceTB/SmolLM2-135M": "small",
    r"\n *web: .*": "",  # a data set of the hub
    r"model: tinyllama-120m": f"model: {json.dumps({'shape': 'tinyllama-120m', **NARROW})}",
    r"model.shape=tinyllama-120m": " ".join([r"\g<0>", *(f"model.{key}={value}" for key, value in NARROW.items())]),
    r"seeds: \[0, 1, 2\]": "seeds: [0]",
    r"fraction: \[0, 0.05, 0.25\]": "fraction: [0, 0.25]",
    r"lr: \[1.0e-4, 3.0e-4\]": "lr: [1.0e-4]",
}
"""What stands in the small world for what a page says: widths as its model's were divided, fewer tokens."""


def _in_miniature(text):
    for pattern, other in SMALLER.items():
        text = re.sub(pattern, other, text)
    return text


@pytest.fixture(scope="module")
def made(small_world, tmp_path_factory):
    """A short run, which every run that a page speaks of is a copy of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_world)
        quicken(patch.setattr)
        settings = SMALL | {"source": "smollm2-135m", "data.dir": "data", "inherit.layers": 4, "control": True}
        settings |= {"train.steps": 3, "checkpoint.keep_every": 1}
        out = tmp_path_factory.mktemp("made") / "run"
        scionlm.run("inheritune", settings, out=out)
    return out


def _run(line, world, made, trains=True):
    words = shlex.split(line)[1:]
    trains = trains and words[0] == "run" and (words[1] not in preset_names() or "data.dir=data" in words)
    if words[0] == "run" and not trains:
        words = ["plan", *words[1:]]
    if words[0] == "plan" and "-o" in words:
        at = words.index("-o")
        words = words[:at] + words[at + 2 :]
    if trains or {"--find-lr", "--calibrate"} & set(words):
        words = [re.sub(TOKENS, r"\g<1>288", word) for word in words]
        words += [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
        words += ["train.tokens=288"] if words[1] in preset_names() and not re.search(TOKENS, line) else []
    shown = world / words[-1 if len(words) == 1 else 1]
    recipe = shown.read_text() if shown.suffix == ".yaml" else ""
    if trains and recipe:
        short = re.sub(r"(global_batch_tokens: )\d+", r"\g<1>96", re.sub(r"(warmup: )\d+\b(?!\.)", r"\g<1>1", recipe))
        shown.write_text(re.sub(TOKENS, r"\g<1>288", short))
    for word in [*words[1:], *re.findall(r"runs/\w+", recipe)]:
        folder = re.match(r"runs/\w+(?:/runs/\w+)?", word)
        if folder and not (world / folder[0]).exists() and not (trains and words[words.index("-o") + 1] == word):
            shutil.copytree(made, world / folder[0])
    if "-o" in words and words[0] != "compare":
        shutil.rmtree(world / words[words.index("-o") + 1], ignore_errors=True)
    return run_scion(words)


PAGES = {name: steps for name in _page_names() if (steps := list(_steps(docs.ROOT / name)))}
ON_GUIDES = {command for name, steps in PAGES.items() if name != "README.md" for _, command in steps}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run(name, world, made, monkeypatch, capsys):
    """What the README shows of a guide is run once, there."""
    quicken(monkeypatch.setattr)
    monkeypatch.setattr("scionlm.evaluation.offline.NUM_ITEMS", 12)
    monkeypatch.setattr("scionlm.recipes.selection._Measure._sample", lambda self: (24, 6))
    monkeypatch.setattr("scionlm.recipes.scores._TOKENS", 2048)
    rates = range_rates()[::12]
    monkeypatch.setattr("scionlm.recipes.range_test.range_rates", lambda: rates)
    shutil.copy(made / "config.yaml", world / "recipe.yaml")
    for file, text in PAGES[name]:
        if name == "README.md" and not file and text in ON_GUIDES:
            continue
        if file:
            (world / file).write_text(_in_miniature(text))
            continue
        line = _in_miniature(text)
        assert _run(line, world, made) == 0, f"{line}\n{capsys.readouterr().err}"


def test_a_command_that_is_wrong_fails(world, made, capsys):
    assert _run("scion inherit smollm2-135m --layers 31 -o larger", world, made) == 2
    assert "31 cannot be made" in capsys.readouterr().err


OWN = ("results/", "recipe.yaml", "-seedN")
LARGE = ("target.parameters=60M", "--calibrate", "--find-lr")
"""Of results, what is of recipes of their own, what trains, and what is larger than the small source."""
OF_RESULTS = {
    re.sub(r"\s+", " ", re.sub(r"\s+#.*", "", line)).strip()
    for path in docs.documents()
    for block in docs.snippets(path.read_text())
    for _, line in docs.command_lines(block.text)
    if "results" in path.parts and re.match(r"scion (plan|run|presets) ", line)
}


@pytest.mark.parametrize(
    "line", sorted(line for line in OF_RESULTS if not any(word in line for word in (*NOT_HERE, *OWN, *LARGE)))
)
def test_a_command_of_a_result_can_be_planned(line, world, made, capsys):
    """Of a run all that happens before anything is trained: its recipe, its source, its target, its bill."""
    without_text = line.replace("data.dir=data", "data.dir=elsewhere")  # whose domains are other ones here
    assert _run(without_text, world, made, trains=False) == 0, capsys.readouterr().err
