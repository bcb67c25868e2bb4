"""Check the documents against the code: links, paths, keys, commands with their settings, and YAML.

python tools/check_docs.py

Looked at are every `.md` of the project and the head comments of examples. Python blocks are run by tests/docs.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from scionlm.cli.commands import app
from scionlm.core.config import Mapping, parse_yaml, section_at, validate
from scionlm.core.errors import UsageError
from scionlm.data.reading.corpora import Corpora
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_sweep import SweepConfig, read_sweep
from scionlm.recipes.presets import SWEEP, find_recipe, override_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "scionlm"
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:|#)([^)#\s]+)")
BLOCK = re.compile(r"^```([a-z]*)\n(.*?)^```", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("docs", "src", "tests", "tools", "benchmarks", "examples")
COMMAND = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:scion|srun torchrun|torchrun)\s")
SCRIPT = re.compile(r"^\s*(?:\$ )?python ((?:tools|benchmarks|examples)/\S+\.py)")
PLACEHOLDERS = {"...", "KEY=VALUE", "[OPTIONS]"}
STAND_INS: dict[str, Mapping] = {
    "inheritune": {"source": "MODEL", "inherit": {"layers": 8}},
    "shear": {"source": "MODEL", "target": {"num_hidden_layers": 8}, "prune": {"tokens": "10M"}},
    "continual": {"source": "MODEL"},
    "scratch": {"model": {"shape": "tinyllama-120m"}},
}
"""What a snippet that shows some keys leaves out, by recipe."""


class Snippet(NamedTuple):
    """A fenced block of a document: its language, its text, the line that it begins on."""

    language: str
    text: str
    line: int


def snippets(text: str) -> list[Snippet]:
    """Return the fenced blocks of a document."""
    return [Snippet(found[1], found[2], text[: found.start()].count("\n") + 2) for found in BLOCK.finditer(text)]


def broken_links(path: Path, text: str) -> list[str]:
    """Return what is said of the relative links, and of the paths in code, that lead nowhere."""
    prose = BLOCK.sub("", text)
    links = [f"link {link} leads nowhere" for link in LINK.findall(prose) if not (path.parent / link).exists()]
    named = [code for code in CODE.findall(prose) if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*/[\w.-]*", code)]
    packages = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    paths = [
        name
        for name in named
        if (first := name.split("/")[0]) in FOLDERS or (first in packages and name.endswith(".py"))
    ]
    paths += re.findall(r"\bdocs/results/[\w./-]*\w", text)  # in commands too
    lost = [name for name in dict.fromkeys(paths) if not any((root / name).exists() for root in (ROOT, PACKAGE))]
    return links + [f"there is no {name}" for name in lost]


def unknown_keys(text: str) -> list[str]:
    """Return what is said of the keys of a recipe, written as `section.key` in code, that there are not."""
    faults: list[str] = []
    for code in CODE.findall(BLOCK.sub("", text)):
        found = re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?=$|[=:])", code)
        if not found or found[1].endswith((".json", ".html", ".yaml", ".py", ".csv", ".md")):
            continue
        here: Any = Recipe
        for key in found[1].split("."):
            fields = {field.alias or name for name, field in here.model_fields.items()}
            if key not in fields:
                faults += [f"`{found[1]}` is no key of a recipe"] if here is not Recipe else []
                break
            name = next(name for name, field in here.model_fields.items() if (field.alias or name) == key)
            here = section_at(here, name)
            if here is None:
                break
    return faults


def command_lines(text: str) -> Iterator[tuple[int, str]]:
    """Give the lines of a block that call Scion, each with its number; continued lines are joined."""
    joined, start = "", 0
    for number, line in enumerate(text.splitlines()):
        start = start if joined else number
        joined += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, joined.strip()
            joined = ""


def wrong_command(line: str, shown: Mapping | None = None) -> str | None:
    """Return what is wrong with a line that calls Scion or a script of the project; None where nothing is.

    Args:
        line: The line.
        shown: The recipe that stands before it on the page, which a file that is not there is taken for.
    """
    if script := SCRIPT.match(line):
        return None if (ROOT / script[1]).exists() else f"there is no {script[1]}"
    if not COMMAND.match(line):
        return None
    words = shlex.split(line.removeprefix("$ "), comments=True)
    ends = [number for number, word in enumerate(words) if word in ("|", "&&", "&", ";", ">")]
    words = words[: ends[0]] if ends else words
    program = next((number for number, word in enumerate(words) if word.endswith(("scion", "scionlm"))), None)
    if program is None:
        return None  # torchrun of something else
    name, *arguments = [word for word in words[program + 1 :] if word not in PLACEHOLDERS]
    wrong = _wrong_arguments(name, arguments, shown)
    return None if "..." in words and (wrong or "").startswith("Missing") else wrong


def _wrong_arguments(name: str, arguments: list[str], shown: Mapping | None) -> str | None:
    root: Any = typer.main.get_command(app)
    if name not in root.commands:
        return f"scion has no command {name}"
    try:
        parameters = root.commands[name].make_context(name, arguments).params
    except Exception as error:
        said = getattr(error, "format_message", None)  # typer brings its own copy of click's exceptions
        return str(said() if callable(said) else error)
    if name in ("run", "plan") and parameters["recipe"] != "RECIPE":
        return wrong_settings(parameters["recipe"], parameters["overrides"] or [], shown)
    return None


def wrong_settings(recipe: str, overrides: list[str], shown: Mapping | None = None) -> str | None:
    """Return what is wrong with a recipe's name or its settings."""
    try:
        config = shown or {"recipe": "inheritune", "train": {"tokens": "20M"}} | STAND_INS["inheritune"]
        if not recipe.endswith(".yaml") or Path(ROOT, recipe).exists():
            config, _ = find_recipe(str(ROOT / recipe) if recipe.endswith(".yaml") else recipe, overrides)
        check_recipe(config, overrides)
    except UsageError as error:
        return str(error)
    return None


def check_recipe(config: Mapping, overrides: list[str] | None = None) -> None:
    """Check a recipe or a sweep, without opening what it names.

    Raises:
        UsageError: A key or a value is wrong.
    """
    if config.get("recipe") == SWEEP:
        read_sweep(config, "sweep", overrides or [])
    else:
        validate(Recipe, override_recipe(config, overrides or []), "recipe")


def wrong_yaml(text: str) -> str | None:
    """Return what is wrong with a block of YAML: a recipe, some keys of one, or a CORPORA.yaml.

    Where a key stands twice, each top-level entry counts as a variant of its own.
    """
    try:
        try:
            variants = [parse_yaml(text, "snippet")]
        except UsageError as error:
            if "stands twice" not in str(error):
                raise
            variants = [parse_yaml(entry, "snippet") for entry in re.split(r"\n(?=\w)", text.strip())]
        for variant in variants:
            _check_variant(variant)
    except UsageError as error:
        return str(error)
    return None


def _check_variant(config: Mapping) -> None:
    if "domains" in config:
        validate(Corpora, config, "CORPORA.yaml")
        return
    if unknown := [key for key in config if key not in {*Recipe.model_fields, *SweepConfig.model_fields}]:
        raise UsageError(f"unknown key {unknown[0]!r}")
    kind = str(config.get("recipe") or ("shear" if "prune" in config or "target" in config else "inheritune"))
    if kind == SWEEP:
        shared = {} if "reference" in config else {"source": "MODEL"}
        shared |= {"inherit": {"layers": 8}} if config.get("kind", "inheritune") == "inheritune" else {}
        check_recipe({"train": {"tokens": "20M"}} | shared | config)
        return
    base: Mapping = {"recipe": kind, "train": {"tokens": "20M"}} | STAND_INS[kind]
    if "reference" in config:
        base.pop("source", None)
    train = {"tokens": "20M"} | config["train"] if set(config.get("train") or {}) & {"global_batch_tokens"} else None
    check_recipe(base | config | ({"train": train} if train else {}))


def faults_of(path: Path, text: str) -> list[str]:
    """Return what is wrong with a document."""
    faults, shown = broken_links(path, text) + unknown_keys(text), None
    for snippet in snippets(text):
        if snippet.language == "text":
            continue
        if snippet.language == "yaml":
            fault = wrong_yaml(snippet.text)
            found = [(0, fault)]
            if not fault and re.search(r"^recipe:", snippet.text, re.M):
                shown = parse_yaml(snippet.text, "snippet")
        else:
            found = [(number, wrong_command(line, shown)) for number, line in command_lines(snippet.text)]
        faults += [f"line {snippet.line + number}: {fault}" for number, fault in found if fault]
    return faults


def head_faults(text: str) -> list[str]:
    """Return what is wrong with the commands in the head comment or docstring of an example."""
    lines = [line.lstrip("# ").strip() for line in text.split("\n\nimport ", 1)[0].splitlines()]
    return [fault for line in lines if (fault := wrong_command(line))]


def menu_faults(menu: Any, pages: set[str]) -> list[str]:
    """Return what is wrong with the site's menu: pages that it leaves out, and pages that there are not."""

    def listed(value: Any) -> Iterator[str]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        yield from [value] if isinstance(value, str) else [page for part in parts for page in listed(part)]

    named = set(listed(menu))
    return [f"nav leaves out {page}" for page in sorted(pages - named)] + [
        f"nav: there is no {page}" for page in sorted(named - pages)
    ]


def documents() -> list[Path]:
    """Return every document of the project."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def main() -> int:
    """Check every document and return the exit code."""
    faults = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in documents()
        for fault in faults_of(path, path.read_text(encoding="utf-8"))
    ]
    for path in sorted(ROOT.glob("examples/*.*")):
        faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in head_faults(path.read_text(encoding="utf-8"))]
    menu = parse_yaml((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), "mkdocs.yml")["nav"]
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    faults += [f"mkdocs.yml: {fault}" for fault in menu_faults(menu, pages)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
