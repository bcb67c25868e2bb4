"""Strict configuration: YAML of a careful subset, overrides, validation with the nearest name."""

from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from scionlm.core.config import Section, apply_overrides, dump_yaml, load_yaml, nearest, parse_yaml, validate
from scionlm.core.errors import DataError, UsageError

quick = settings(max_examples=150)


class Optimizer(Section):
    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95])


class Distill(Section):
    teacher: str = "source"
    weight: float = Field(default=0.5, ge=0, le=1)


class Domain(Section):
    paths: list[str]


class Keep(Section):
    layers: int | Literal["half"] | None = None
    which: str | list[int] | None = None
    shares: float | dict[str, Annotated[float, Field(gt=0)]] | None = None
    rule: Literal["cosine", "linear"] = "cosine"
    names: list[str] = Field(default=[])
    pair: tuple[float, float] = (0.0, 0.0)
    is_fast: bool = False


class Recipe(Section):
    recipe: str
    seed: int = 0
    optimizer: Optimizer = Optimizer()
    distill: Distill | None = None
    domains: dict[str, Domain] = Field(default_factory=dict)
    runs: list[Optimizer] = Field(default_factory=list)
    keep: Keep = Keep()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3.0e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("+7", 7),
        ("20_000_000", 20_000_000),
        ("012", 12),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, 2.5, a]", [1, 2.5, "a"]),
    ],
)
def test_plain_values_mean_what_they_look_like(text, value):
    found = parse_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "off", "No", "y", "n", "2020-01-01", "1:30", "0x1F", "0o17", "1e", "nan", ".inf", "50M"]
)
def test_words_that_yaml_1_1_turns_into_other_things_stay_words(word):
    assert parse_yaml(f"key: {word}", "x") == {"key": word}


def test_plain_pyyaml_would_turn_no_into_a_boolean_and_leave_3e_4_a_word():
    """The control: the library alone breaks both promises."""
    assert yaml.safe_load("a: no\nb: 3e-4") == {"a": False, "b": "3e-4"}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "s:\n  k: 1\n  k: 1", "[{a: 1, a: 2}]", "a: 1\n'a': 2"])
def test_a_key_that_stands_twice_is_refused_by_name_and_line(text):
    with pytest.raises(UsageError, match=r"stands twice.*line \d"):
        parse_yaml(text, "x")


def test_the_same_key_in_different_sections_is_fine():
    assert parse_yaml("a: {k: 1}\nb: {k: 2}", "x") == {"a": {"k": 1}, "b": {"k": 2}}


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x", "a: &x {k: 1}\nb: {<<: *x}"])
def test_aliases_are_refused(text):
    with pytest.raises(UsageError, match="alias"):
        parse_yaml(text, "x")


def test_an_alias_bomb_is_refused_at_once():
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(UsageError, match="alias"):
        parse_yaml("\n".join(rows), "x")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: 1\n---\nb: 2",
        "a: \x00",
        "1: a",
        "? [1]\n: 2",
        "{" * 5000,
        "n: " + "9" * 5000,
        "a: !!python/object/apply:os.system [id]",
        "a: !!python/name:os.system",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_of_the_subset_is_a_usage_error_that_names_the_place(text):
    with pytest.raises(UsageError, match=r"^recipe\.yaml is not valid YAML") as caught:
        parse_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: !!bool maybe", "a: !!timestamp x", "a: !!int [1]", "a: !!float {}"])
def test_a_wrong_explicit_tag_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not valid YAML"):
        parse_yaml(text, "x")


def test_load_yaml_names_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(UsageError, match="does not exist"):
        load_yaml(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(UsageError, match="must hold a mapping"):
        load_yaml(path)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_yaml(path)
    path.write_bytes(b"# " + b"x" * (4 * 2**20))
    with pytest.raises(DataError, match="not a configuration file"):
        load_yaml(path)


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(UsageError, match=r"^r\.yaml: unknown key 'sed'; did you mean 'seed'\?"):
        validate(Recipe, {"recipe": "x", "sed": 1}, "r.yaml")


def test_an_unknown_key_far_from_all_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown key 'qqq'; known here: recipe, seed, optimizer"):
        validate(Recipe, {"recipe": "x", "qqq": 1}, "r")


def test_an_unknown_key_inside_a_section_is_named_with_its_path():
    with pytest.raises(UsageError, match=r"unknown key 'optimizer\.learning'"):
        validate(Recipe, {"recipe": "x", "optimizer": {"learning": 1}}, "r")
    with pytest.raises(UsageError, match=r"unknown key 'optimizer\.beta'; did you mean 'betas'\?"):
        validate(Recipe, {"recipe": "x", "optimizer": {"beta": 1}}, "r")


def test_an_unknown_key_inside_an_optional_section_has_a_nearest_name():
    with pytest.raises(UsageError, match=r"unknown key 'distill\.techer'; did you mean 'teacher'\?"):
        validate(Recipe, {"recipe": "x", "distill": {"techer": "y"}}, "r")


def test_an_unknown_key_inside_a_mapping_of_sections_has_a_nearest_name():
    with pytest.raises(UsageError, match=r"unknown key 'domains\.prose\.path'; did you mean 'paths'\?"):
        validate(Recipe, {"recipe": "x", "domains": {"prose": {"path": ["a"]}}}, "r")


def test_an_unknown_key_inside_a_list_of_sections_has_a_nearest_name():
    with pytest.raises(UsageError, match=r"unknown key 'runs\.0\.nam'; did you mean 'name'\?"):
        validate(Recipe, {"recipe": "x", "runs": [{"nam": "a"}]}, "r")


def test_a_misspelt_required_key_is_reported_as_misspelt_not_as_missing():
    with pytest.raises(UsageError, match=r"unknown key 'recip'; did you mean 'recipe'\? \(and 1 more\)"):
        validate(Recipe, {"recip": "x"}, "r")


def test_a_missing_key_and_a_wrong_value_are_named():
    with pytest.raises(UsageError, match=r"^r: key 'recipe' is required$"):
        validate(Recipe, {}, "r")
    with pytest.raises(UsageError, match=r"distill\.weight: .*less than or equal to 1 \(got 2\)"):
        validate(Recipe, {"recipe": "x", "distill": {"weight": 2}}, "r")
    with pytest.raises(UsageError, match=r"optimizer\.lr"):
        validate(Recipe, {"recipe": "x", "optimizer": {"lr": float("inf")}}, "r")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layers": 1.5}, "keep.layers: must be a whole number or 'half' (got 1.5)"),
        ({"layers": "hlf"}, "keep.layers: must be a whole number or 'half' (got 'hlf'); did you mean 'half'?"),
        ({"which": 0}, "keep.which: must be text or a list (got 0)"),
        ({"which": [0, "x"]}, "keep.which.1: must be a whole number (got 'x')"),
        ({"which": {"a": 0}}, "keep.which: must be text or a list"),
        ({"shares": "x"}, "keep.shares: must be a number or a mapping of keys (got 'x')"),
        ({"shares": {"prose": 0}}, "keep.shares.prose: must be greater than 0 (got 0)"),
        ({"rule": "cosin"}, "keep.rule: must be 'cosine' or 'linear' (got 'cosin'); did you mean 'cosine'?"),
        ({"rule": "x"}, "keep.rule: must be 'cosine' or 'linear' (got 'x')"),
        ({"names": "a"}, "keep.names: must be a list, as [a] (got 'a')"),
        ({"names": [3]}, "keep.names.0: must be text (got 3)"),
        ({"pair": [0.5]}, "key 'keep.pair.1' is required"),
        ({"is_fast": "maybe"}, "keep.is_fast: must be true or false (got 'maybe')"),
        (3, "keep: must be a mapping of keys (layers, which, shares, ...) (got 3)"),
        ({"layers": "x", "which": 0}, "keep.layers: must be a whole number or 'half' (got 'x') (and 1 more)"),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_in_plain_words_under_its_own_key(keep, message):
    with pytest.raises(UsageError) as caught:
        validate(Recipe, {"recipe": "x", "keep": keep}, "r")
    assert str(caught.value) == f"r: {message}"


def test_a_truth_value_is_not_taken_for_a_number():
    with pytest.raises(UsageError, match="seed"):
        validate(Recipe, {"recipe": "x", "seed": True}, "r")


def test_a_section_cannot_be_changed_afterwards():
    recipe = validate(Recipe, {"recipe": "x"}, "r")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5


def test_an_override_sets_one_key_and_leaves_the_original_alone():
    before = {"optimizer": {"lr": 1.0, "name": "adamw"}, "seed": 0}
    after = apply_overrides(before, ["optimizer.lr=3e-4"])
    assert after == {"optimizer": {"lr": 3e-4, "name": "adamw"}, "seed": 0}
    assert before == {"optimizer": {"lr": 1.0, "name": "adamw"}, "seed": 0}


def test_an_override_into_a_null_or_absent_section_makes_it():
    assert apply_overrides({"distill": None}, ["distill.weight=0.25"]) == {"distill": {"weight": 0.25}}
    assert apply_overrides({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


def test_an_override_through_a_value_that_is_not_a_section_is_refused_by_name():
    with pytest.raises(UsageError, match=r"seed is not a section"):
        apply_overrides({"seed": 0}, ["seed.x=1"])
    with pytest.raises(UsageError, match=r"a\.b is not a section"):
        apply_overrides({"a": {"b": [1]}}, ["a.b.0=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("3e-4", 3e-4),
        ("{x: 1}", {"x": 1}),
        ("a=b", "a=b"),
        ("50M tokens", "50M tokens"),
    ],
)
def test_an_override_value_is_read_as_yaml(text, value):
    assert apply_overrides({}, [f"k={text}"]) == {"k": value}


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", ".a=1", "a.=1", "", "k=[1"])
def test_an_override_of_another_form_is_refused(override):
    with pytest.raises(UsageError, match="override"):
        apply_overrides({}, [override])


def test_later_overrides_win():
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


words = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20)
recipes = st.fixed_dictionaries(
    {
        "recipe": words.filter(lambda word: not word[:1].isdigit()),
        "seed": st.integers(-(2**63), 2**63),
        "optimizer": st.fixed_dictionaries(
            {
                "name": st.sampled_from(
                    ["adamw", "no", "null", "true", "", "a: b", "#", "- x", "'", '"', "3e", "2020-01-01"]
                ),
                "lr": st.floats(allow_nan=False, allow_infinity=False),
                "betas": st.lists(st.floats(0, 1), max_size=3),
            }
        ),
        "distill": st.none() | st.fixed_dictionaries({"teacher": words.map("t".__add__), "weight": st.floats(0, 1)}),
    }
)


@quick
@given(recipes)
def test_a_recipe_comes_back_from_its_own_yaml(config):
    recipe = validate(Recipe, config, "r")
    again = validate(Recipe, parse_yaml(dump_yaml(recipe.model_dump()), "again"), "again")
    assert again == recipe


@pytest.mark.parametrize("word", ["1e5", "08", "3e-4", "4e10", "1_0.5e3", "no", "null", "true", "12", "1.5", "é\x85"])
def test_a_word_that_looks_like_something_else_comes_back_as_a_word(word):
    assert parse_yaml(dump_yaml({"k": word}), "x") == {"k": word}


def test_a_list_that_stands_in_two_places_comes_back_from_yaml():
    betas = [0.9, 0.95]
    value = {"a": {"betas": betas}, "b": {"betas": betas}}
    assert parse_yaml(dump_yaml(value), "x") == value


def test_yaml_keeps_the_order_of_keys():
    assert list(parse_yaml(dump_yaml({"z": 1, "a": 2, "m": 3}), "x")) == ["z", "a", "m"]


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("layers", ["layer", "heads"]) == "; did you mean 'layer'?"
    assert nearest("qqq", ["layer", "heads"]) == ""
