"""Task folders of users, looked at before lm-eval reads them: its YAML can name Python code, and such tasks are code.

Nothing here runs what a file says. What is let through still has templates: those run in jinja2's sandbox.
"""

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml

from scionlm.core.errors import DataError, UsageError

_BYTES = 2**20  # of one file
_CODE_KEYS = {
    "class": "a Python class",
    "hf_evaluate": "a metric whose code is downloaded",
    "trust_remote_code": "code",
}
_READERS = ("json", "csv", "parquet", "text", "arrow")
"""What `datasets` reads without running code; its `pandas` would run what a file holds."""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_task_folder(folder: Path, allow_code: bool, metrics: Container[str]) -> None:
    """Refuse a folder whose tasks would run code.

    Args:
        folder: With the YAML files of tasks, at any depth.
        allow_code: Let code through; what is no YAML at all is refused all the same.
        metrics: lm-eval's own; the code of any other is looked for here and on the hub.

    Raises:
        UsageError: There is no such folder, no task in it, or a task that runs code.
        DataError: A file is broken.
    """
    if not folder.is_dir():
        raise UsageError(f"tasks folder {folder} does not exist")
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UsageError(f"tasks folder {folder} has no .yaml file")
    root, seen = folder.resolve(), set[Path]()
    for path in files:
        _check_file(path, root, allow_code, metrics, seen)


def _check_file(path: Path, root: Path, allow_code: bool, metrics: Container[str], seen: set[Path]) -> None:
    place = path.resolve()
    if place in seen:
        return
    seen.add(place)
    config, tags = _read(path)
    reasons = [f"names the tag {tag}" for tag in tags]
    reasons += [reason for key, value in _walk(config) if (reason := _reason(key, value, metrics))]
    if not place.is_relative_to(root):
        reasons.append("lies outside the tasks folder")
    if reasons and not allow_code:
        raise UsageError(
            f"{path} {reasons[0]}: evaluating it can run code; look at it, and add --allow-task-code if you trust it"
        )
    includes = config.get("include", []) if isinstance(config, dict) else []
    for name in includes if isinstance(includes, list) else [includes]:
        included = path.parent / str(name)
        if not included.is_file():
            raise DataError(f"{path} includes {name}, which is not there")
        _check_file(included, root, allow_code, metrics, seen)


def _read(path: Path) -> tuple[Any, list[str]]:
    """Return what a YAML file holds, its own tags read as text, and these tags."""
    tags: list[str] = []

    class Loader(yaml.SafeLoader):
        """The safe one, which notes tags that it does not know."""

    def note(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
        tags.append(node.tag)
        return str(node.value)

    Loader.add_multi_constructor("", note)
    try:
        if path.stat().st_size > _BYTES:
            raise DataError(f"{path} is larger than a task can be ({_BYTES:,} bytes)")
        return yaml.load(path.read_text(encoding="utf-8"), Loader), tags  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from error


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _reason(key: str, value: Any, metrics: Container[str]) -> str | None:
    """Return why a key asks for code to be run; None where it does not."""
    if key in _CODE_KEYS and value:
        return f"has {key} ({_CODE_KEYS[key]})"
    if key == "unsafe_code" and value:
        return "is marked unsafe_code"
    if key == "metric" and isinstance(value, str) and value not in metrics:
        return f"has metric {value!r}, which is none of lm-eval's own"
    if key == "dataset_path" and not (value in _READERS or _is_hub_id(value)):
        return f"has dataset_path {value!r} (neither {', '.join(_READERS)} nor a hub id)"
    return None


def _is_hub_id(value: Any) -> bool:
    """Return whether something is ORG/NAME, and no folder here, which may hold code."""
    return isinstance(value, str) and bool(_HUB_ID.fullmatch(value)) and not Path(value).exists()
