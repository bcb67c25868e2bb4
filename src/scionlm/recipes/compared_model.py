"""A plain model that is compared with runs: its held-out losses, measured once and kept."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scionlm.core.log import say
from scionlm.core.records import Record, read_json, write_json
from scionlm.data import DataFolder
from scionlm.families import ModelShape, count_parameters
from scionlm.sources import resolve

MODELS = "models"
"""Folder of what was measured, in that of the comparison."""

Evaluate = Callable[..., dict[str, Any]]


def measured_model(
    name: str, data: Path, out: Path, evaluate: Evaluate, *, seq_len: int, max_tokens: int | None, domains: list[str]
) -> Record:
    """Return a model's shape and losses, read back where they were measured before in the same way.

    Args:
        name: MODEL as the user named it.
        data: Data folder made by `scion prepare`.
        out: Folder of the comparison.
        evaluate: Measures: of `api.evaluate`'s form.
        seq_len: Tokens predicted in one window.
        max_tokens: Budget a domain; None takes all.
        domains: Which domains, as far as the data has them all; else all that it has.

    Raises:
        UsageError: There is no such model or data.
        DataError: Model and data do not fit, or one is broken.
    """
    folder, opened = resolve(name), DataFolder(data)
    names = domains if domains and set(domains) <= set(opened.domains) else opened.domains
    how = {
        "fingerprint": folder.fingerprint(),
        "data": opened.fingerprint,
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "domain_names": names,
    }
    path = out / MODELS / f"{hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]}.json"
    if path.exists():
        say(f"{folder.name}: measured before ({path})")
        return read_json(path) | {"name": folder.name}
    losses = evaluate(name, data, seq_len=seq_len, max_tokens=max_tokens, domains=names)
    found = {
        "name": folder.name,
        "model": {"num_parameters": count_parameters(folder.config)["total"]} | ModelShape.of(folder.config).to_dict(),
        "domains": {domain: loss.to_dict() for domain, loss in losses.items()},
    } | how
    write_json(path, found)
    return found
