"""The reference pages are what the code says, and a key without a description is an error."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from scionlm.core.config import Section
from scionlm.core.quantities import Count, Steps
from scionlm.recipes.config import Recipe
from scripts import load_script

reference = load_script("tools/make_reference.py")


def test_the_pages_are_what_the_code_says():
    assert not reference.stale_pages(), "run python tools/make_reference.py"


def test_a_page_that_is_behind_the_code_is_found(tmp_path):
    for name, make in reference.PAGES.items():
        (tmp_path / name).write_text(make())
    assert reference.stale_pages(tmp_path) == []
    page = tmp_path / "configuration.md"
    page.write_text(page.read_text().replace("`131072`", "`65536`"))
    assert reference.stale_pages(tmp_path) == ["configuration.md"]


class Bare(Section):
    """A section with a key that nobody described."""

    size: int = 3
    """Described."""
    colour: str = "red"


class Inner(Section):
    """What is inside."""

    rate: float = Field(default=1e-8, gt=0, lt=2)
    """How fast."""


class Told(Section):
    """A section."""

    tokens: Count | None = None
    """How many, a | b."""
    way: Literal["up", "down"] | Annotated[int, Field(ge=1)] = "up"
    """Where to."""
    over: Steps = 0.1
    """How long."""
    inner: Inner = Inner()
    parts: list[str] = Field(default=[], min_length=2)
    """Which."""
    base: bool = Field(default=False, alias="from")
    """Whether."""
    needed: dict[str, float]
    """By name."""


def test_a_key_without_a_description_is_an_error():
    with pytest.raises(reference.UndescribedError, match=r"Bare\.colour"):
        reference.key_descriptions(Bare)


def test_a_row_has_the_key_its_type_its_default_and_what_it_is():
    rows = {row[0]: row[1:] for row in reference.section_rows(Told, "", {"inner": "there"})}
    assert rows == {
        "`tokens`": ("count or `null`", "`null`", "How many, a | b."),
        "`way`": ("`up`, `down` or whole number (at least 1)", "`up`", "Where to."),
        "`over`": ("length", "`0.1`", "How long."),
        "`inner`": ("[section](#there)", "as below", "What is inside."),
        "`parts`": ("list of text (entries: at least 2)", "`[]`", "Which."),
        "`from`": ("`true` or `false`", "`false`", "Whether."),
        "`needed`": ("mapping to number", "required", "By name."),
    }
    assert reference.section_rows(Inner, "", {})[0][1:3] == ("number (above 0, below 2)", "`1e-08`")


def test_every_section_of_a_recipe_is_there_once():
    paths = [path for path, _ in reference.sections(Recipe)]
    assert len(paths) == len(set(paths))
    assert {"data.ramp", "prune.gates", "distill.hidden", "stages", "grow"} <= set(paths)
    page = reference.configuration()
    for path in paths:
        assert page.count(f"\n### {path}\n") == 1


def test_every_command_and_flag_is_there():
    page = reference.commands()
    for said in (
        "## scion train-tokenizer",
        "`--vocab-size` N",
        "`-o`, `--out` PATH",
        "`--stream`, `--no-stream`",
        "`[KEY=VALUE]...`",
    ):
        assert said in page


def test_words_for_what_is_not_known_are_an_error():
    with pytest.raises(TypeError, match="no words"):
        reference.type_words(bytes)
