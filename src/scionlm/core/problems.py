"""What pydantic finds wrong with a configuration, in the words of one who wrote it."""

import re
from collections.abc import Sequence
from typing import Any, cast

from pydantic_core import ErrorDetails

# Input should be ..., List should have ...: what it is called there is no word of the configuration's.
_SUBJECT = re.compile(r"^\w+ should ")
_TAIL = re.compile(r" after validation, not \d+$")
_WORDS = {
    "int_type": "be a whole number",
    "int_parsing": "be a whole number",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "float_parsing": "be a number",
    "string_type": "be text",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "list_type": "be a list",
    "tuple_type": "be a list",
    "dict_type": "be a mapping of keys",
    "model_type": "be a mapping of keys",
    "model_attributes_type": "be a mapping of keys",
}


def key_path(problem: ErrorDetails, config: Any) -> list[str]:
    """Return the keys that lead to a problem, without the parts of a union that pydantic names among them.

    Args:
        problem: What was found.
        config: The value that was looked at.
    """
    path: list[str] = []
    here, last = config, len(problem["loc"]) - 1
    for number, part in enumerate(problem["loc"]):
        names_itself = number == last and problem["type"] in ("missing", "extra_forbidden")
        if names_itself:
            here = None
        elif isinstance(here, dict) and part in here:
            here = cast("dict[Any, Any]", here)[part]
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(cast("Sequence[Any]", here)):
            here = cast("Sequence[Any]", here)[part]
        else:
            continue
        path.append(str(part))
    return path


def deepest(problems: Sequence[ErrorDetails], config: Any) -> dict[str, list[ErrorDetails]]:
    """Return problems by the key that they are about, in order: of a value that could be one of several, all of them.

    Where one of these got further into the value than others, it is what was meant, and the others are left out.
    """
    found: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for problem in problems:
        found.setdefault(tuple(key_path(problem, config)), []).append(problem)
    outer = {key[:length] for key in found for length in range(1, len(key))}
    return {".".join(key): mine for key, mine in found.items() if key not in outer}


def in_words(problems: Sequence[ErrorDetails]) -> str:
    """Return what is wrong with one value: all that it could have been."""
    told = [problem for problem in problems if problem["type"] == "value_error"]
    if told:
        return told[0]["msg"].removeprefix("Value error, ")
    wanted = [_wanted(problem) for problem in problems]
    first, *others = dict.fromkeys(wanted)
    return f"must {first}" + "".join(f" or {other.removeprefix('be ')}" for other in others)


def choices(problems: Sequence[ErrorDetails]) -> list[str]:
    """Return the words that a value could have been."""
    expected = [str(problem.get("ctx", {}).get("expected", "")) for problem in problems]
    return re.findall(r"'([^']*)'", " ".join(expected))


def _wanted(problem: ErrorDetails) -> str:
    """Return what a value has to do, as words behind `must`."""
    return _WORDS.get(problem["type"]) or _TAIL.sub("", _SUBJECT.sub("", problem["msg"]))
