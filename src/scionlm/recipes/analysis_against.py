"""Another model's analysis, to set beside one: source and child, before and after training."""

from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import Record, read_json

_SAME = ("seq_len", "num_sequences", "loss_sequences", "tau", "eta", "lazy_tolerance", "precision", "seed")


def is_analysis(name: str) -> bool:
    """Return whether a folder holds an analysis."""
    return (Path(name) / "analysis.json").is_file()


def read_other(name: str, record: Record) -> Record:
    """Return the analysis in the folder `name`, which must be of the same text, in the same way, as `record`.

    Raises:
        UsageError: It is of other text, or was made otherwise.
        DataError: It is broken.
    """
    path = Path(name) / "analysis.json"
    other = read_json(path)
    try:
        told = [(key, other[key], record[key]) for key in _SAME]
        told += [(f"data {key}", other["data"][key], record["data"][key]) for key in ("fingerprint", "split")]
        theirs, ours = ([each["name"] for each in one["domains"]] for one in (other, record))
        told.append(("domains", theirs, ours))
        total = other["model"]["num_hidden_layers"]
        if len(other["layers"]) != total:
            raise DataError(f"{path} has {len(other['layers'])} layers, its model {total}")
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is broken: it lacks {error}") from error
    for key, theirs, ours in told:
        if theirs != ours:
            raise UsageError(
                f"{path} was made with another {key} ({theirs!r}, here {ours!r}); analyse that model with the same "
                "settings, or give the model itself"
            )
    return other


def beside(other: Record) -> Record:
    """Return what is kept of the other analysis."""
    return {key: other[key] for key in ("model", "overall", "layers", "heads", "groups", "domains", "lengths", "lens")}
