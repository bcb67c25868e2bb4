"""Reference losses that a recipe gives in numbers, or by a file of `scion fit-reference`."""

from pathlib import Path
from typing import Any

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json
from scionlm.data.mixing.reweight import Losses
from scionlm.recipes.config_data import ReweightConfig


def given_references(config: ReweightConfig, domains: list[str]) -> Losses:
    """Return the references that a recipe gives in numbers or by a file of `scion fit-reference`.

    Raises:
        UsageError: A domain has none, or the file or its size is not there.
        DataError: The file is not one of references.
    """
    found: dict[str, Any] = config.reference if isinstance(config.reference, dict) else _read(config)
    for name in domains:
        if name not in found:
            raise UsageError(f"reweight.reference has no loss for domain {name!r} (has: {', '.join(found)})")
    return {name: float(found[name]) for name in domains}


def _read(config: ReweightConfig) -> Losses:
    path = Path(str(config.reference))
    if not path.is_file():
        raise UsageError(
            f"reweight.reference {config.reference!r}: give source, best, losses by domain, or a file of scion "
            "fit-reference"
        )
    try:
        sizes: Any = read_json(path)["references"]
        if not isinstance(sizes, dict) or not sizes:
            raise ValueError("references is no mapping of sizes")
        target = config.target if config.target is not None or len(sizes) != 1 else next(iter(sizes))
        if target not in sizes:
            raise UsageError(
                f"reweight.target {target!r} is not a size of {path}{nearest(str(target), list(sizes))} "
                f"(has: {', '.join(sizes)})"
            )
        return {name: float(entry["nll"]) for name, entry in sizes[target].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a file of scion fit-reference") from error
