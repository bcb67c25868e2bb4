"""`scion plan` of a sweep: what each of its runs will take, and all together."""

import json
import tempfile
from pathlib import Path

from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_sweep import Sweep, SweepRun
from scionlm.recipes.origin import open_source
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.selection import plan_of
from scionlm.surgery.target import target_config

_SUMMED = ("num_tokens", "num_steps", "flops", "seconds")
_LARGEST = ("num_parameters", "memory_bytes_per_device")


def plan_sweep(sweep: Sweep, device: str | None = None, world: int = 1, per_node: int | None = None) -> Record:
    """Return what the runs of a sweep will take: sums, the largest model and memory, and a plan each under `runs`.

    Args:
        sweep: The sweep.
        device: See `plan_recipe`, as for the others.
        world: How many devices.
        per_node: How many in one machine.

    Raises:
        UsageError: The device is not known, or a run cannot be made.
        DataError: A source is broken or of an unknown family.
    """
    with tempfile.TemporaryDirectory() as shapes:
        runs: list[Record] = []
        for run in sweep.chosen:
            try:
                planned = plan_recipe(_with_shape(sweep, run, Path(shapes)), device, world, per_node)
            except UsageError as error:
                raise UsageError(f"run {run.folder}: {error}") from error
            runs.append({"name": run.name, "seed": run.recipe.seed} | planned | {"source": run.recipe.source})
    shared = {key: runs[0][key] for key in ("device", "devices", "utilization", "peak_flops")}
    sums = {key: sum(run[key] for run in runs) for key in _SUMMED}
    return (
        {"recipe": "sweep"} | {key: max(run[key] for run in runs) for key in _LARGEST} | sums | shared | {"runs": runs}
    )


def _with_shape(sweep: Sweep, run: SweepRun, shapes: Path) -> Recipe:
    """Return a run's recipe; where its source is yet to be trained, with a folder that holds its config.json alone."""
    parent = sweep.parent_of(run)
    if parent is None:
        return run.recipe
    folder = shapes / parent.folder
    if not folder.exists():
        recipe = _with_shape(sweep, parent, shapes)
        source = open_source(recipe, None, weights=False)
        folder.mkdir()
        shape = target_config([source.config], plan_of(recipe, source), for_a_plan=True)
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return run.recipe.model_copy(update={"source": str(folder)})
