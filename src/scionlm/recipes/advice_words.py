"""A piece of advice, as plans hold it."""

from scionlm.core.records import Record


def say(what: str, why: str, override: str | None = None) -> Record:
    """Return a piece of advice: `what` a recipe does, `why` it might do otherwise, `set`, the override that does so."""
    return {"what": what, "why": why, "set": override}
