"""Scores of the models in a comparison, on tasks and a clock: measured once each and kept."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from scionlm.core.devices import this_machine
from scionlm.core.files import sha256_file
from scionlm.core.log import say
from scionlm.core.machine import versions
from scionlm.core.records import Record, read_json, write_json
from scionlm.data import DataFolder
from scionlm.recipes.compared_model import MODELS
from scionlm.recipes.evaluate import EvaluateOptions, evaluate_model
from scionlm.sources import resolve


def measured_scores(
    models: Mapping[str, str], data: str | Path | None, out: Path, options: EvaluateOptions
) -> dict[str, Record]:
    """Return `tasks`, `items`, `suites` and `inference` of each model, read back where they were measured before.

    Args:
        models: MODEL by the name of its row.
        data: Data folder, which suite `offline` is made of.
        out: Folder of the comparison.
        options: What is measured; losses are not.

    Raises:
        UsageError: There is no such model, task or suite.
        DataError: A model or task is broken.
        StorageError: A task's data is not to be had.
    """
    asked = {key: value for key, value in asdict(options).items() if key not in ("losses", "tasks_dir")}
    asked |= {"versions": versions("lm_eval"), "tasks_dir": _hash_of(options.tasks_dir)}
    asked |= {"device": this_machine().name} if options.speed else {}
    text = None if data is None else DataFolder(Path(data)).fingerprint
    found: dict[str, Record] = {}
    for name, model in models.items():
        how = asked | {"fingerprint": resolve(model).fingerprint(), "data": text}
        path = out / MODELS / f"scores-{hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]}.json"
        if path.exists():
            say(f"{name}: scored before ({path})")
            found[name] = read_json(path)
            continue
        record = evaluate_model(model, data, options).record
        write_json(path, {"name": name, "how": how} | record)
        found[name] = record
    return found


def _hash_of(folder: str | Path | None) -> str | None:
    """Return a hash of the files in a folder of tasks; None without one."""
    if folder is None:
        return None
    root = Path(folder)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    listed = [f"{path.relative_to(root)} {sha256_file(path)}" for path in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()
