"""Strict configuration: one pydantic schema, YAML without surprises, `KEY=VALUE` overrides, did-you-mean.

The YAML that is read is a careful subset: `3e-4` is a number, `no` is a word, a key twice is an error, and aliases
(which can expand without bound) are refused.
"""

# PyYAML has no types: what it gives counts as Any here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportIncompatibleMethodOverride=false

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic
import yaml
from pydantic_core import ErrorDetails

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import storage_error
from scionlm.core.problems import choices, deepest, in_words, key_path

Mapping = dict[str, Any]
_MAX_BYTES = 4 * 2**20
_SHOWN = 3  # keys of a section that stand as examples


class Section(pydantic.BaseModel):
    """Base of every section of a recipe: unknown keys are errors, values cannot be changed afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and bool not in (field.annotation, *typing.get_args(field.annotation)):
            raise ValueError(f"{str(value).lower()} is not a value for it")
        return value


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, as far as a recipe needs it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not supported ({self.peek_event().start_mark})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Mapping:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} is not a word; quote it ({key_node.start_mark})")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice ({key_node.start_mark})")
            seen.add(key)
        return cast("Mapping", super().construct_mapping(node, deep))


# Take out YAML 1.1's yes/no/on/off, dates, octals and sexagesimals, and put in plain numbers.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[1] in ("null", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, where: str) -> Any:
    """Return the value that a YAML text holds.

    Raises:
        UsageError: It is not YAML of the supported subset; the message says the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader derives from SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def load_yaml(path: Path) -> Mapping:
    """Return the mapping that a YAML file holds.

    Raises:
        UsageError: The file is absent or not a YAML mapping.
        DataError: It is larger than any configuration.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a YAML file")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} has more than {_MAX_BYTES} bytes: not a configuration file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise storage_error(error, path) from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a mapping of keys to values")
    return cast("Mapping", value)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value: no aliases, and quotes where its words would be numbers."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line ends as they are, and reads each as a space.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Mapping) -> str:
    """Return a mapping as YAML in its own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` for the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def apply_overrides(config: Mapping, overrides: Sequence[str]) -> Mapping:
    """Return a copy of `config` with each `key.path=value` set; a key inside a null section makes that section.

    The value is read as YAML, so `a.b=[1, 2]`, `a.b=null` and `a.b=3e-4` mean what they mean in a file.

    Raises:
        UsageError: An override has no `=`, or its path runs through a value that is not a section.
    """
    result = typing.cast("Mapping", _copy(config))
    before = ""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            cut = f"; if it belongs to the one before, quote both: '{before} {override}'" if before else ""
            raise UsageError(f"override {override!r} must have the form KEY=VALUE, as optimizer.lr=3e-4{cut}")
        before = override
        here = result
        for depth, key in enumerate(keys[:-1]):
            inner = here.get(key)
            if inner is None:
                inner = here[key] = {}
            if not isinstance(inner, dict):
                raise UsageError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a section")
            here = cast("Mapping", inner)
        here[keys[-1]] = parse_yaml(text, f"override {override!r}")
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in cast("Mapping", value).items()}
    return value


def validate(schema: type[S], config: Mapping, where: str) -> S:
    """Return `config` as an instance of `schema`.

    Raises:
        UsageError: A key is unknown (with the nearest known one) or missing, or a value is wrong; one line, the first
            problem, and how many more there are.
    """
    try:
        return schema.model_validate(config)
    except pydantic.ValidationError as error:
        found = deepest(error.errors(include_url=False), config)
        # An unknown key is usually the cause of the others (a required key that was misspelt).
        unknown = (key for key, mine in found.items() if mine[0]["type"] == "extra_forbidden")
        key = next(unknown, next(iter(found)))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(f"{where}: {_problem(schema, key, found[key], config)}{more}") from error


def _problem(schema: type[Section], key: str, problems: list[ErrorDetails], config: Mapping) -> str:
    """Return in words what is wrong with the value of one key."""
    first = problems[0]
    if first["type"] == "missing":
        return f"key {key!r} is required"
    path = key_path(first, config)
    if first["type"] == "extra_forbidden":
        known = _keys_at(schema, path[:-1])
        listed = f"; known here: {', '.join(known)}" if known else ""
        return f"unknown key {key!r}{nearest(path[-1], known) or listed}"
    text, value = in_words(problems), first["input"]
    if text == "must be a list" and isinstance(value, str):
        text += f", as [{value}]"
    if inside := _keys_at(schema, path) if "mapping" in text else []:
        text += f" ({', '.join(inside[:_SHOWN])}, ...)"
    if key and isinstance(value, str | int | float | bool):
        near = nearest(value, choices(problems)) if isinstance(value, str) else ""
        text += f" (got {value!r}){near}"
    return f"{key}: {text}" if key else text


def check_keys(schema: type[Section], config: Mapping, where: str) -> None:
    """Refuse keys that `schema` does not have, in a configuration that may lack others still.

    Raises:
        UsageError: A key is unknown; as `validate` says it.
    """
    try:
        schema.model_validate(config)
    except pydantic.ValidationError as error:
        for key, mine in deepest(error.errors(include_url=False), config).items():
            if mine[0]["type"] == "extra_forbidden":
                raise UsageError(f"{where}: {_problem(schema, key, mine, config)}") from error


def section_at(schema: type[Section], key: str) -> type[Section] | None:
    """Return the schema of the section under `key`; None where there is a plain value, or nothing."""
    field = schema.model_fields.get(key)
    inner = _section_in(field.annotation) if field else None
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def _keys_at(schema: type[Section], path: Sequence[str]) -> list[str]:
    """Return the keys of the section at `path`, looking through `X | None`, mappings and lists of sections."""
    here: Any = schema
    for part in path:
        if isinstance(here, type) and issubclass(here, Section):
            field = here.model_fields.get(part)
            here = _section_in(field.annotation) if field else None
        elif typing.get_origin(here) in (dict, list):
            here = _section_in(typing.get_args(here)[-1])  # the part is a name or an index
        else:
            return []
    if not (isinstance(here, type) and issubclass(here, Section)):
        return []
    return [field.alias or name for name, field in here.model_fields.items()]


def _section_in(annotation: Any) -> Any:
    """Return the one part of a type that can hold a section: `X` of `X | None`, a mapping or a list as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return next((part for part in parts if isinstance(part, type) or typing.get_origin(part)), None)
    return annotation
