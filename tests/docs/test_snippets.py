"""Every block of Python in the documents is run, on tiny models and texts, and the five-minute start whole."""

import json
import re

import pytest
from small_runs import SMALL

import scionlm
from scionlm.cli.main import run as run_scion
from scripts import load_script
from whole_runs import quicken

docs = load_script("tools/check_docs.py")
NOT_RUN = {"docs/instruction-tuning.md"}
"""Its page says so: it needs TRL, which is no dependency of Scion. It is compiled."""


def _python(path):
    return [one for one in docs.snippets(path.read_text()) if one.language == "python"]


NAMES = [str(path.relative_to(docs.ROOT)) for path in docs.documents() if _python(path)]


def _small(monkeypatch):
    """Make every run a short one, whatever its recipe says."""
    quicken(monkeypatch.setattr)
    whole = scionlm.run

    def run(recipe, overrides=None, **options):
        given = {key: value for key, value in (overrides or {}).items() if key != "train.tokens"}
        return whole(recipe, given | SMALL, **options)

    monkeypatch.setattr(scionlm, "run", run, raising=False)


def _run_blocks(path):
    names = {}
    for block in _python(path):
        code = "\n" * (block.line - 1) + block.text  # a traceback names the page's own lines
        exec(compile(code, str(path), "exec"), names)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_RUN])
def test_python_of_a_page_runs(name, world, monkeypatch, capsys):
    _small(monkeypatch)
    for folder in ("runs/demo/model", "runs/small/model"):
        (world / folder).parent.mkdir(parents=True, exist_ok=True)
        (world / folder).symlink_to(world / "small")
    _run_blocks(docs.ROOT / name)


def test_python_that_is_not_run_compiles():
    assert set(NAMES) >= NOT_RUN
    for name in NOT_RUN:
        for block in _python(docs.ROOT / name):
            compile(block.text, name, "exec")


def test_a_block_that_is_wrong_fails(tmp_path, world):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nimport scionlm as scion\n\nscion.inherit('smollm2-135m', layer=3)\n```\n")
    with pytest.raises(Exception, match="layer"):
        _run_blocks(page)


def test_the_five_minute_start_runs_from_one_end_to_the_other(world, monkeypatch, capsys):
    """Its files are what the page shows, its commands run in their order, on fewer tokens."""
    _small(monkeypatch)
    page = docs.ROOT / "docs" / "start.md"
    blocks = docs.snippets(page.read_text())
    (world / "data").rename(world / "data-of-the-world")  # the page prepares its own
    commands = 0
    for block in blocks:
        if block.language == "yaml":
            name = "small.yaml" if "recipe:" in block.text else "CORPORA.yaml"
            (world / name).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
        else:
            for _, line in docs.command_lines(block.text):
                if line.startswith("scion "):
                    commands += 1
                    _run_command(line)
    assert commands == 8
    assert json.loads((world / "runs/small/status.json").read_text())["state"] == "done"
    assert {path.name for path in (world / "compared").iterdir()} >= {"compare.html", "compare.md", "compare.json"}


def _run_command(line):
    words = re.sub(r"\s+#.*", "", line).split()[1:]
    if words[0] in ("run", "plan"):
        words = [word for word in words if not word.startswith("train.tokens=")]
        words += [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    assert run_scion(words) == 0, line
