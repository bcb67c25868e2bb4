"""Write the pages of docs/reference that follow from the code: commands, configuration, names.

python tools/make_reference.py            # write them
python tools/make_reference.py --check    # exit with 1 where a page is not what the code says

They are committed, so that they can be read and linked to without building anything; a test compares them with what
the code says.
"""

import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scionlm.analysis.ranking import CRITERIA
from scionlm.cli.commands import app
from scionlm.core.config import Section
from scionlm.core.devices import GPUS
from scionlm.core.quantities import Beta, Count, Length, Time
from scionlm.data.reading.corpora import Corpora
from scionlm.recipes.analysis_options import AnalyzeOptions
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_shear import GATES_BY_FIDELITY
from scionlm.recipes.config_sweep import RunName, SweepConfig
from scionlm.recipes.measured import MEASURED
from scionlm.recipes.model_shapes import KNOWN_SHAPES
from scionlm.recipes.presets import preset_names, preset_summary
from scionlm.surgery.depth import STRATEGIES

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- Made by tools/make_reference.py from the code: change the code, not this page. -->\n"

_NAMED = ((Count, "count"), (Length, "length"), (Time, "time"), (Beta, "number"))
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}
_ENDLESS = 2**53  # a limit beyond it is the machine's
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "entries: at least"}


class UndescribedError(Exception):
    """A key of the schema has no description."""


def key_descriptions(schema: type[Section]) -> dict[str, str]:
    """Return what the string under each field of a section says.

    Raises:
        UndescribedError: A field has none.
    """
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not (issubclass(cls, Section) and cls is not Section):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, [*body.body[1:], None], strict=True):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = " ".join(str(after.value.value).split())
    sections = {name: section_of(field.annotation) for name, field in schema.model_fields.items()}
    found |= {
        name: (inner.__doc__ or "").strip().splitlines()[0]
        for name, inner in sections.items()
        if inner is not None and inner.__doc__ and name not in found
    }
    if lacking := [name for name in schema.model_fields if not found.get(name)]:
        raise UndescribedError(f"{schema.__name__}.{lacking[0]}: no string under it says what it is")
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a value of this type is, or is a list or a mapping of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_of(part) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)


def type_words(annotation: Any) -> str:
    """Return a type in words."""
    named = next((words for one, words in _NAMED if annotation == one), None) or _PLAIN.get(annotation)
    if named is not None:
        return named
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return _compound(get_origin(annotation) or annotation, get_args(annotation), annotation)


def _compound(origin: Any, parts: tuple[Any, ...], annotation: Any) -> str:
    if origin is typing.Annotated:
        words = type_words(parts[0]) + _bounds(list(annotation.__metadata__))
    elif origin is Literal:
        words = _listed(f"`{part}`" for part in parts)
    elif origin in (typing.Union, types.UnionType):
        words = _listed(words for part in parts for words in re.split(", | or ", type_words(part)))
    elif origin is list:
        words = f"list of {type_words(parts[0])}"
    elif origin is tuple:
        words = f"[{', '.join(type_words(part) for part in parts)}]"
    elif origin is dict:
        words = f"mapping to {type_words(parts[1])}" if parts and parts[1] is not Any else "mapping"
    else:
        raise TypeError(f"no words for {annotation}")
    return words


def _listed(words: Iterable[str]) -> str:
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _bounds(metadata: list[Any]) -> str:
    said: list[str] = []
    for one in metadata:
        rules = one.metadata if isinstance(one, FieldInfo) else [one]
        said += [
            f"{words} {limit:g}"
            for rule in rules
            for name, words in _BOUNDS.items()
            if (limit := getattr(rule, name, None)) is not None and limit < _ENDLESS
        ]
    return f" ({', '.join(said)})" if said else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        if field.default_factory is None:
            return "required"
        value: Any = field.default_factory()  # pyright: ignore[reportCallIssue]
    else:
        value = field.default
    if isinstance(value, Section):
        return "as below"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def section_rows(schema: type[Section], prefix: str, anchors: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Return a row for each key of a section: the key, its type, its default, what it is."""
    described, hints = key_descriptions(schema), typing.get_type_hints(schema, include_extras=True)
    rows: list[tuple[str, str, str, str]] = []
    for name, field in schema.model_fields.items():
        key = field.alias or name
        words = type_words(hints[name])
        words += "" if get_origin(hints[name]) is typing.Annotated else _bounds(field.metadata)
        if (anchor := anchors.get(prefix + key)) is not None:
            words = words.replace("section", f"[section](#{anchor})")
        rows.append((f"`{key}`", words, _default(field), described[name]))
    return rows


def sections(schema: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Give every section inside of one, with its dotted path, in the order of the schema."""
    for name, field in schema.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            here = f"{path}{field.alias or name}"
            yield here, inner
            yield from sections(inner, f"{here}.")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def _schema_part(title: str, schema: type[Section], intro: str = "", level: int = 2) -> str:
    inner = list(sections(schema))
    head = ("key", "type", "default", "what it is")
    headings = {path: path if schema is Recipe else f"{title}: {path}" for path, _ in inner}
    anchors = {path: _anchor(heading) for path, heading in headings.items()}
    text = f"{'#' * level} {title}\n\n{intro}{_table(head, section_rows(schema, '', anchors))}\n"
    for path, section in inner:
        doc = inspect.getdoc(section) or ""
        said = doc.split("\n\n")[0].replace("\n", " ")
        rows = _table(head, section_rows(section, f"{path}.", anchors))
        text += f"{'#' * (level + 1)} {headings[path]}\n\n{said}\n\n{rows}\n"
        if path == "prune.gates":
            text += _gate_defaults()
    return text


def _anchor(heading: str) -> str:
    """Return the address of a heading, which GitHub and the site make alike."""
    return re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-")


def _gate_defaults() -> str:
    by = GATES_BY_FIDELITY
    keys = list(by["recommended"])
    rows = [(f"`{key}`", *(_of(by[name][key]) for name in by)) for key in keys]
    return "What `null` stands for, by `fidelity`:\n\n" + _table(("key", *(f"`{name}`" for name in by)), rows) + "\n"


def _of(value: Any) -> str:
    if isinstance(value, float):
        return f"`{value:.4g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def configuration() -> str:
    """Return the page of every key of a recipe, a sweep, a CORPORA.yaml and an analysis."""
    return (
        f"# Configuration\n\n{MADE}\n"
        "Every key that a file or a `KEY=VALUE` may have. An unknown key is an error that names the nearest known one. "
        "A key inside a section is written `section.key` on a command line.\n\n"
        "- *count*: a whole number above 0, also written `20M` (`k`, `M`, `B` or `G`, `T`).\n"
        "- *length*: a whole number is steps, a number below 1 a share of the run, and texts carry their unit: "
        "`50M tokens`, `10 min`.\n"
        "- *time*: `30 min`, `6 hours`.\n\n"
        + _schema_part("A recipe", Recipe, "`scion run`, `scion plan`, and `scionlm.run` take it.\n\n")
        + _schema_part(
            "A sweep",
            SweepConfig,
            "A file with `recipe: sweep` also has the keys of a recipe, which its runs share.\n\n",
        )
        + _schema_part("A run of a sweep", RunName, "Beside these, any keys of a recipe.\n\n")
        + _schema_part("CORPORA.yaml", Corpora, "`scion prepare` and `scion train-tokenizer` read it.\n\n")
        + _schema_part("An analysis", AnalyzeOptions, "Options of `scionlm.analyze`; `scion analyze` has flags.\n\n")
    )


def _flags(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} {_value(parameter)}"


def _value(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    words = {int: "N", float: "X", Path: "PATH"}
    inner = get_args(kind)[0] if get_origin(kind) is list else kind
    return words.get(inner, "TEXT")


def _usage(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    needed = [one for one in command.params if one.param_type_name == "option" and one.required]
    words = [one.metavar or (one.name.upper() if one.required else f"[{one.name.upper()}]") for one in arguments]
    words += [f"{one.opts[0]} {_value(one)}" for one in needed]
    options = len(needed) < len([one for one in command.params if one.param_type_name == "option"])
    return " ".join(["scion", name, *words, *(["[OPTIONS]"] if options else [])])


def commands() -> str:
    """Return the page of every command, argument and flag."""
    root: Any = typer.main.get_command(app)
    text = f"# Commands\n\n{MADE}\n{root.help}\n\n{app.info.epilog}\n\n"
    text += "Results go to stdout: a table or, with `--json`, one JSON document. All else goes to stderr.\n\n"
    for name, command in root.commands.items():
        text += f"## scion {name}\n\n{command.help}\n\n```text\n{_usage(name, command)}\n```\n\n"
        rows: list[tuple[str, ...]] = []
        for one in command.params:
            argument = one.param_type_name == "argument"
            default = one.default
            shown = "required" if one.required else "" if default in (None, False) else f"`{default}`"
            label = f"`{one.metavar or one.name.upper()}`" if argument else _flags(one)
            rows.append((label, shown, one.help or ""))
        text += _table(("", "default", "what it is"), rows) + "\n"
    return text


def names() -> str:
    """Return the page of presets, known models, devices and ways to choose layers."""
    presets = [(f"`{name}`", preset_summary(name)) for name in preset_names() if not name.endswith("-mini")]
    minis = [(f"`{name}`", preset_summary(name)) for name in preset_names() if name.endswith("-mini")]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shapes = [(f"`{name}`", *(f"{getattr(shape, size):,}" for size in sizes)) for name, shape in KNOWN_SHAPES.items()]
    devices = [
        (f"`{gpu.name}`", f"{gpu.bf16_flops / 1e12:g}" if gpu.has_bf16 else "none", f"{gpu.fp32_flops / 1e12:g}",
         f"{(gpu.memory_bytes or 0) / 2**30:.1f}")
        for gpu in GPUS.values()
    ]  # fmt: skip
    return (
        f"# Names\n\n{MADE}\n"
        "## Presets\n\n`scion presets NAME` prints one, head comment and all; `--corpora` what prepares its text.\n\n"
        + _table(("preset", "what it does"), presets)
        + "\n## Presets for two cores\n\n"
        + _table(("preset", "what it does"), minis)
        + "\n## Known models\n\nFor `target.shape`, and for `model` where `scion` knows every setting of it.\n\n"
        + _table(("name", "layers", "hidden", "MLP", "heads", "key/value heads"), shapes)
        + "\n## Devices\n\nFor `scion plan --device`, in small letters too, without RTX, or as the driver names a "
        "card; `a100-40gb` has less memory.\n\n"
        + _table(("name", "bf16 TFLOP/s", "fp32 TFLOP/s", "memory, GiB"), devices)
        + "\n## Ways to choose layers\n\nFor `scion inherit --strategy` and `inherit.strategy`.\n\n"
        + _table(("name", "which layers stay"), [(f"`{name}`", STRATEGIES[name][1]) for name in STRATEGIES])
        + "\nMeasured, for `inherit.strategy` and `prune.strategy`, or by `scion analyze`:\n\n"
        + _table(("name", "which layers stay"), [(f"`{name}`", why) for name, why in MEASURED.items()])
        + "\n## Criteria of an analysis\n\n"
        + _table(("name", "what it says of a layer"), [(f"`{name}`", why) for name, why in CRITERIA.items()])
    )


PAGES: dict[str, Callable[[], str]] = {"commands.md": commands, "configuration.md": configuration, "names.md": names}


def stale_pages(folder: Path = FOLDER) -> list[str]:
    """Return the pages in a folder that are not what the code says."""
    return [
        name
        for name, make in PAGES.items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    """Write the pages, or check them, and return the exit code."""
    if "--check" in sys.argv[1:]:
        for name in (stale := stale_pages()):
            print(
                f"docs/reference/{name} is not what the code says; run python tools/make_reference.py", file=sys.stderr
            )
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
