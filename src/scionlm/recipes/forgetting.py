"""What continual pre-training has cost and brought: losses of what was known before, and of what is new.

Forgetting is the upstream loss at the end less that before, adaptation the downstream loss before less that at the end,
both in nats (Gupta et al., arXiv:2308.04014; Ibrahim et al., arXiv:2403.08763). Means are plain ones over the domains.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from scionlm.core.records import Record

Losses = Mapping[str, float]


def forgetting(
    before: Losses,
    after: Losses,
    evaluations: Sequence[Record],
    upstream: Sequence[str],
    stages: Sequence[tuple[str, int, Sequence[str]]],
) -> Record | None:
    """Return what was forgotten and what was learned; None where neither is known.

    Args:
        before: Loss of each domain before training, nats.
        after: At the end.
        evaluations: Lines of metrics that have losses, in order.
        upstream: The domains that were known before; all others are downstream.
        stages: Of each stage its name, its last step, and the domains that it was the first to train on.
    """
    downstream = [name for name in after if name not in upstream]
    record: Record = {"upstream": None, "downstream": None, "net": None}
    for key, names in (("upstream", list(upstream)), ("downstream", downstream)):
        if names:
            ends = {"before": mean_of(before, names), "after": mean_of(after, names)}
            record[key] = {"domains": names} | ends | {"peak": _peak(evaluations, names)}
    old, new = record["upstream"], record["downstream"]
    if old:
        old["forgetting"] = old["after"] - old["before"]
    if new:
        new["adaptation"] = new["before"] - new["after"]
    if old and new:
        record["net"] = new["adaptation"] - old["forgetting"]
    if len(stages) > 1:
        record["stages"] = [
            _of_stage(name, last, names, before, after, evaluations) for name, last, names in stages if names
        ]
    return record if old or len(stages) > 1 else None


def _of_stage(
    name: str, last: int, names: Sequence[str], before: Losses, after: Losses, evaluations: Sequence[Record]
) -> Record:
    """Return what became of the domains that a stage was the first to train on."""
    line = next((line for line in evaluations if line["step"] == last and _has(line, names)), None)
    end = mean_of(losses_in(line, names), names) if line else mean_of(after, names)
    at_the_end = mean_of(after, names)
    return {
        "name": name,
        "domains": list(names),
        "before": mean_of(before, names),
        "at_its_end": end,
        "after": at_the_end,
        "forgetting": at_the_end - end,
    }


def _peak(evaluations: Sequence[Record], names: Sequence[str]) -> Record | None:
    """Return the highest mean loss on the way, and where it was: the stability gap shows in it."""
    seen = [(mean_of(losses_in(line, names), names), line) for line in evaluations if _has(line, names)]
    if not seen:
        return None
    nll, line = max(seen, key=lambda pair: pair[0])
    return {"nll": nll, "step": line["step"], "tokens": line.get("tokens")}


def mean_of(losses: Losses, names: Sequence[str]) -> float:
    """Return the plain mean over domains."""
    return sum(losses[name] for name in names) / len(names)


def losses_in(line: Record, names: Sequence[str]) -> dict[str, float]:
    """Return the losses that a line of metrics has, by domain."""
    return {name: line[_key(name)] for name in names}


def _has(line: Record, names: Sequence[str]) -> bool:
    return all(isinstance(line.get(_key(name)), float) for name in names)


def _key(name: str) -> str:
    return f"eval/{name}/nll_nats"


def nll_of(domains: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses of a record of domains as result.json has it."""
    return {name: loss["nll"] for name, loss in domains.items()}
