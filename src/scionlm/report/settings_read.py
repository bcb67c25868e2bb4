"""The settings on which it hangs what a continued model forgets, in words, as its recipe has them."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from scionlm.data.mixing.replay import REPLAY_FRACTION
from scionlm.report.collect import Run
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import percent

SEED = re.compile(r"-seed(\d+)$")
_MAX_STAGES = 20


def settings_of(run: Run) -> Mapping[str, str]:
    """Return name and value of each setting that is known; of several stages all values that differ, in order."""
    found = run.config.get("stages")
    stages = [mapping(one) for one in found[:_MAX_STAGES]] if isinstance(found, list) and found else [{}]
    every = [dict(_of_stage(run.config, stage)) for stage in stages]
    values = {key: ", ".join(dict.fromkeys(one[key] for one in every if key in one)) for one in every for key in one}
    source, branch = text(run.config, "source"), mapping(run.config.get("branch"))
    step, of = number(branch, "step"), text(branch, "run")
    if source is not None or of is not None:
        values["source"] = source_label(source or of or "")
    if branch:
        values["branch"] = f"step {step:,.0f}" if step is not None and math.isfinite(step) else "newest checkpoint"
    return values


def source_label(name: str) -> str:
    """Return the name of a source as a person calls it: that of the run it is the result of, else as it is.

    Example:
        >>> source_label("/data/sweep/runs/base-seed1/model"), source_label("org/model-8b"), source_label("/data/m8")
        ('base', 'org/model-8b', 'm8')
    """
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and parts[-1] == "model":
        return SEED.sub("", parts[-2])
    return SEED.sub("", parts[-1]) if len(parts) > 1 and parts[0] in ("/", "..", "~") else name


def without_seed(path: str) -> str:
    """Return a path to something of a sweep without the seeds that the sweep has put behind the names of its runs."""
    return "/".join(SEED.sub("", part) for part in path.split("/"))


def _of_stage(top: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    optimizer, schedule = ({**mapping(top.get(key)), **mapping(stage.get(key))} for key in ("optimizer", "schedule"))
    rate = number(optimizer, "lr")
    if rate is not None and math.isfinite(rate):
        yield "peak learning rate", rate_words(rate)
    name, warmup = text(schedule, "name"), _length(schedule.get("warmup"))
    if "replay" in stage or "replay" in top:
        replay = {**mapping(top.get("replay")), **mapping(stage.get("replay"))}
        asked = bool(replay) and stage.get("replay", replay) is not None
        share = number({"fraction": REPLAY_FRACTION, **replay}, "fraction") if asked else 0.0
        if share is not None and math.isfinite(share):
            yield "replay", share_words(share) if share else "none"
    if warmup is not None:
        yield "warm-up", warmup
    if name is not None:
        yield "schedule", name


def rate_words(rate: float) -> str:
    """Return a learning rate as it is written in recipes.

    Example:
        >>> rate_words(0.0003), rate_words(0.00015), rate_words(0.0)
        ('3e-4', '1.5e-4', '0')
    """
    mantissa, exponent = f"{rate:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if rate else "0"


def share_words(share: float) -> str:
    """Return a share in percent; of one below half a percent the digits count.

    Example:
        >>> share_words(0.05), share_words(0.005), share_words(0.0025)
        ('5%', '0.5%', '0.25%')
    """
    return percent(share) if share * 100 == round(share * 100) else f"{100 * share:.3g}%"


def _length(value: object) -> str | None:
    """Return a duration in words: an integer is steps, below 1 it is a share of the stage."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if not value:
        return "none"
    return share_words(value) if 0 < value < 1 else f"{value:.0f} steps"
