"""The page of one run: a sentence that says what came of it, and under it the sections that show how.

`summary` has the sentence, `sections` and `training` have the rest; this file puts them in order.
"""

from scionlm.report.attention import attention_section
from scionlm.report.collect import Run
from scionlm.report.distill import distill_section
from scionlm.report.findings import find
from scionlm.report.forgetting import forgetting_section
from scionlm.report.growth import growth_section
from scionlm.report.html import Markup, clip, join, name_of, page, tag
from scionlm.report.mixture import mixture_section
from scionlm.report.pruning import pruning_section
from scionlm.report.schedule import schedule_section
from scionlm.report.sections import (
    loss_section,
    machine_section,
    origin_section,
    sample_section,
    settings_section,
)
from scionlm.report.summary import banner, headline, result_section
from scionlm.report.tasks import read_tasks, task_section
from scionlm.report.training import curve_section
from scionlm.report.weights import weight_section

_STATES = {"done": "done", "running": "running", "stopped": "stopped", "failed": "failed"}


def run_page(run: Run) -> str:
    """Return the page of `run` as one HTML document."""
    finding = find(run)
    state = run.status.state
    pill = tag("span", clip(state, 40), class_=f"state {_STATES.get(state, 'unknown')}")
    header = join(
        tag("div", sprout(), tag("span", "Scion run report"), _recipe(run), pill, class_="eyebrow"),
        tag("h1", name_of(run.folder)),
        headline(run, finding),
    )
    main = join(
        banner(run),
        result_section(run, finding),
        forgetting_section(run),
        growth_section(run),
        pruning_section(run),
        origin_section(run),
        curve_section(run),
        distill_section(run),
        weight_section(run),
        mixture_section(run),
        schedule_section(run),
        attention_section(run),
        loss_section(run),
        task_section(read_tasks(run.scores)),
        sample_section(run),
        machine_section(run),
        settings_section(run),
    )
    version = run.manifest.get("scion_version")
    by = f"Drawn from the files in the folder {clip(run.folder, 80)}"
    made = f"{by}, a run of Scion {clip(str(version), 40)}." if version else f"{by}."
    return str(page(f"{clip(run.folder, 80)} \u2013 Scion", header, main, tag("p", made)))


def _recipe(run: Run) -> Markup | None:
    return tag("span", "recipe ", name_of(run.recipe, 40)) if run.recipe else None


def sprout() -> Markup:
    """Return the mark of Scion: a cutting that has taken."""
    return tag(
        "svg",
        tag(
            "path",
            d="M12 22V10M12 13C12 8 8 6 3.5 6C3.5 11 7 13.5 12 13M12 10C12 5.5 15 2.5 20.5 2.5C20.5 8 17 10.5 12 10",
        ),
        viewBox="0 0 24 24",
        class_="sprout",
        aria_hidden="true",
    )
