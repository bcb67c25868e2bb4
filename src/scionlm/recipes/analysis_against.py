"""Another model's analysis, to set beside one: source and child, before and after training."""

from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import Record, read_json

_KEPT = ("model", "overall", "layers", "heads", "groups", "domains", "lengths", "lens")


def is_analysis(name: str) -> bool:
    """Return whether a folder holds an analysis."""
    return (Path(name) / "analysis.json").is_file()


def read_other(name: str, settings: Record) -> Record:
    """Return the analysis in the folder `name`, which must be of the same text, made in the same way.

    Args:
        name: The folder.
        settings: What decides the numbers here (`analysis_store`).

    Raises:
        UsageError: It is of other text, or was made otherwise.
        DataError: It is broken.
    """
    path = Path(name)
    theirs, other = read_json(path / "settings.json"), read_json(path / "analysis.json")
    for key, ours in settings.items():
        if key not in ("model", "config") and theirs.get(key) != ours:  # these two it is of another
            raise UsageError(
                f"{path} was made with another {key} ({theirs.get(key)!r}, here {ours!r}); analyse that model with the "
                "same settings, or give the model itself"
            )
    try:
        kept = beside(other)
        sound = len(kept["layers"]) == kept["model"]["num_hidden_layers"] and kept["layers"][0]["max_rank"] >= 0
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path / 'analysis.json'} is not whole; analyse that model again") from error
    if not sound:
        raise DataError(f"{path / 'analysis.json'} does not fit its own model; analyse that model again")
    return kept


def beside(other: Record) -> Record:
    """Return what is kept of another analysis."""
    return {key: other[key] for key in _KEPT}
