"""Continual pre-training: go on with a model on new text, and measure what it learns and what it forgets.

Source: Gupta et al., arXiv:2308.04014 (re-warm and re-decay); Ibrahim et al., arXiv:2403.08763 (replay, infinite
    schedules).
Differs: any number of data sets in sequence, a teacher and an average with the first weights as brakes on forgetting;
    losses are measured densely where a stage begins.
"""

from pathlib import Path

from scionlm.core.log import warn
from scionlm.core.records import Record, read_json, read_jsonl, write_json
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.recipes.child import evaluate_source, train_control, train_one
from scionlm.recipes.forgetting import forgetting, nll_of
from scionlm.recipes.inputs import Inputs
from scionlm.recipes.rounds import CONTROL
from scionlm.recipes.setting import Setting, settle


def run_continual(
    inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False
) -> Record:
    """Run the recipe into `out`; each finished phase is kept, so that the same call goes on after a stop."""
    setting = settle(inputs, out, stop, ranks, allow_change)
    if not setting.upstream and ranks.is_main:
        warn("nothing says what the model knew before, so nothing will show what it forgets; set upstream or replay")
    source = evaluate_source(setting, out)
    result = train_one(setting, out, source, name="child")
    result = ranks.on_main(lambda: result | {"forgetting": _forgetting(setting, out, source, result)})
    if setting.recipe.control:
        result = train_control(setting, out / CONTROL, source, result, out)
    ranks.on_main(lambda: write_json(out / "result.json", result))
    return ranks.on_main(lambda: read_json(out / "result.json"))


def _forgetting(setting: Setting, out: Path, source: Record, result: Record) -> Record | None:
    # A branch may begin before the end of its source.
    before = nll_of(result["before"] if setting.recipe.branch else source["domains"])
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if any(key.startswith("eval/") for key in line)]
    stages: list[tuple[str, int, list[str]]] = []
    place_of = {(data.fingerprint, domain): name for name, (data, domain) in setting.held_out.items()}
    seen, last = set(setting.upstream), 0
    for one in setting.stages:
        last += one.stage.total_steps
        names = [place_of[one.data.fingerprint, domain] for domain in one.sampling.domains]
        stages.append((one.stage.name, last, [name for name in names if name not in seen]))
        seen |= set(names)
    return forgetting(before, nll_of(result["domains"]), lines, setting.upstream, stages)
