"""The documents say what the code does; and what checks that, finds what is wrong."""

import re
from pathlib import Path

import pytest

from scripts import load_script

docs = load_script("tools/check_docs.py")
site = load_script("tools/check_site.py")
PAGE = Path(docs.ROOT / "docs" / "page.md")


def test_the_documents_are_right(capsys):
    assert docs.main() == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("scion prune smollm2-135m", "no command prune"),
        ("scion inherit smollm2-135m --layer 3 -o small", "layer"),
        ("scion inherit", "source"),
        ("scion evaluate small --data data --max-tokens many", "max-tokens"),
        ("scion evaluate small --data data --max-tokens 0", "max-tokens"),
        ("scion run inheritune-nano -o runs/a", "unknown|is no file"),
        ("scion run inheritune-mini train.token=2M -o runs/a", "did you mean 'tokens'"),
        ("scion run inheritune-mini optimizer.lr=fast -o runs/a", "lr"),
        ("scion run inheritune source=MODEL data.dir=data inherit.layers=8 -o runs/a", "train.tokens"),
        ("scion plan recipe.yaml schedule.name=triangle", "schedule.name"),
        ("torchrun --nproc-per-node 2 -m scionlm run inheritune-mini train.paralel=ddp -o runs/a", "parallel"),
        ("HF_HUB_OFFLINE=1 scion evaluate", "model"),
        (".venv/bin/scion inspct small", "inspct"),
        ("python benchmarks/nothing.py", "nothing.py"),
    ],
)
def test_a_wrong_command_is_found(line, says):
    assert re.search(says, docs.wrong_command(line) or "")


@pytest.mark.parametrize(
    "line",
    [
        "scion run inheritune-mini data.dir=data data.mixture=null train.tokens=2M -o runs/mine   # a comment",
        "scion run recipe.yaml optimizer.lr=1e-3 -o runs/a",
        "scion plan shear source=MODEL data.dir=data target.parameters=60M prune.tokens=1M train.tokens=5M",
        "torchrun --nproc-per-node 8 -m scionlm run RECIPE KEY=VALUE ... -o RUN",
        "scion presets | head",
        "pip install -e .",
        "it would be nonsense to check words that call nothing",
    ],
)
def test_a_right_command_is_not(line):
    assert docs.wrong_command(line) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recipe: inheritune\nsource: A\ninherit: {layers: 3}\ntrain: {token: 5}\n", "tokens"),
        ("data: {dir: data, mixtures: {a: 1}}\n", "mixture"),
        ("ramp: {over: 3}\n", "ramp"),
        ("inherit: {layers: 3}\ninherit: {layers: 3, keep: '0-2'}\n", "keep"),
        ("recipe: sweep\nsource: A\nruns: [{name: a, inherit: {layers: none}}]\n", "layers"),
        ("domains: {prose: {path: [a.txt]}}\n", "paths"),
        ("data: {dir: [}\n", "not valid YAML"),
        ("prune: {method: scissors, tokens: 10M}\n", "method"),
    ],
)
def test_wrong_yaml_is_found(text, says):
    assert says in (docs.wrong_yaml(text) or "")


def test_a_sweep_file_on_a_page_is_the_recipe_of_its_commands():
    sweep = "```yaml\nrecipe: sweep\nsource: A\nruns: [{name: a, inherit: {layers: 3}}]\ntrain: {tokens: 5M}\n```\n"
    command = "```\nscion run sweep.yaml runs.{}.seed=1 -o out\n```\n"
    assert docs.faults_of(PAGE, sweep + command.format("a")) == []
    assert "names no run" in docs.faults_of(PAGE, sweep + command.format("b"))[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("![picture](images/nowhere.png)", "nowhere.png"),
        ("see `src/scionlm/nowhere.py`", "nowhere.py"),
        ("see `recipes/nowhere.py`", "nowhere.py"),
        ("`scion run docs/results/nowhere.yaml data.dir=data`", "nowhere.yaml"),
        ("set `train.tokns`", "train.tokns"),
        ("set `prune.gates.sharper: 3`", "prune.gates.sharper"),
        ("set `grow.base=student`", "grow.base"),
        ("```\nscion run inheritune-mini \\\n  train.token=2M\n```", "line 2"),
    ],
)
def test_what_leads_nowhere_is_found(text, says):
    assert says in " ".join(docs.faults_of(PAGE, text))
    for right in (
        "[there](index.md)",
        "`grow.from=student`",
        "`train.tokens`",
        "`recipes/run.py`",
        "`data/report.html`",
    ):
        assert docs.faults_of(PAGE, right) == []


def test_the_head_of_an_example_is_checked():
    head = '"""What.\n\n    scion preparee CORPORA.yaml -o data\n    python examples/nowhere.py a\n"""\n\nimport sys\n'
    assert len(docs.head_faults(head)) == 2


def test_a_page_that_the_menu_leaves_out_is_found():
    menu = [{"Start": "index.md"}, {"Guides": [{"One": "guides/one.md"}, "guides/two.md"]}]
    pages = {"index.md", "guides/one.md", "guides/two.md"}
    assert docs.menu_faults(menu, pages) == []
    assert docs.menu_faults(menu, pages | {"lost.md"}) == ["nav leaves out lost.md"]
    assert docs.menu_faults(menu, pages - {"guides/two.md"}) == ["nav: there is no guides/two.md"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("index.html", '<a href="gone.html">x</a>', "gone.html"),
        ("index.html", '<a href="other.html#gone">x</a>', "other.html#gone"),
        ("index.html", '<a href="#gone">x</a>', "#gone"),
        ("index.html", '<img src="gone.png">', "gone.png"),
        ("index.html", '<script src="https://unpkg.com/x.js"></script>', "fetches https://unpkg.com"),
        ("index.html", '<link rel="stylesheet" href="//fonts.googleapis.com/css">', "fetches //fonts"),
        ("index.html", '<link rel="preconnect" href="https://fonts.gstatic.com">', "fetches"),
        ("index.html", "<style>@import url(https://a.b/c.css);</style>", "fetches https://a.b"),
        ("index.html", '<p style="background: url(http://a.b/c.png)">x</p>', "fetches http://a.b"),
        ("style.css", "@font-face { src: url('https://a.b/c.woff2') }", "fetches https://a.b"),
    ],
)
def test_a_page_that_asks_another_machine_or_leads_nowhere_is_found(tmp_path, name, text, says):
    good = '<a href="https://arxiv.org">x</a><a href="other.html#here">y</a><link rel="canonical" href="https://a.b/">'
    (tmp_path / "index.html").write_text(good)
    (tmp_path / "other.html").write_text('<h2 id="here">z</h2><img src="data:image/png;base64,AA">')
    assert site.site_faults(tmp_path) == []
    with (tmp_path / name).open("a") as file:
        file.write(text)
    assert [fault for fault in site.site_faults(tmp_path) if says in fault]


def test_a_site_without_pages_is_a_fault(tmp_path):
    assert site.site_faults(tmp_path)
