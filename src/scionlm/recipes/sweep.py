"""A sweep from start to finish: several runs into RUN/runs, one after the other, each an ordinary run folder."""

import contextlib
import gc
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from scionlm.core.config import dump_yaml, load_yaml
from scionlm.core.errors import DivergenceError, ScionError, StoppedError, UsageError, exit_code_of
from scionlm.core.files import write_text_atomic
from scionlm.core.log import say, silenced, warn
from scionlm.core.records import Record, read_json
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import Ranks
from scionlm.recipes.config import RUN_PREFIX, Recipe
from scionlm.recipes.config_sweep import Sweep, SweepRun, read_sweep
from scionlm.recipes.inputs import check_enough, open_inputs
from scionlm.recipes.lengths import timed_paths
from scionlm.recipes.origin import with_data
from scionlm.recipes.run import (
    claimed_folder,
    ended_early,
    flatten,
    is_done,
    run_within,
    settle_recipe,
    stoppable,
    write_manifest,
    write_status,
)
from scionlm.recipes.siblings import RUNS
from scionlm.recipes.sweep_plan import plan_sweep

AfterRun = Callable[[Path], object]


@dataclass(frozen=True)
class _Placed:
    """A run with the folders that it goes into and that what it needs comes from.

    Attributes:
        run: The run.
        recipe: With every path filled in.
        folder: Its run folder.
        needs: The run folders of the runs that it begins with or replays, by the key that names them.
    """

    run: SweepRun
    recipe: Recipe
    folder: Path
    needs: dict[str, Path]

    @property
    def began(self) -> bool:
        """Whether it was begun already."""
        return (self.folder / "config.yaml").exists()

    @property
    def diverged(self) -> bool:
        """Whether it has ended so."""
        path = self.folder / "status.json"
        status = read_json(path) if path.exists() else {}
        return (status.get("state"), status.get("exit_code")) == ("failed", DivergenceError.exit_code)


@dataclass(frozen=True)
class _Making:
    """What making runs needs, the same for all of them."""

    stop: StopRequest
    ranks: Ranks
    allow_change: bool
    after_run: AfterRun


def run_sweep(sweep: Sweep, out: Path, allow_change: bool = False, after_run: AfterRun = lambda folder: None) -> Record:
    """Make every run of a sweep in the folder `out`, or go on with them, and say how each ended.

    A run that diverges does not end the sweep, and is not begun again; anything else that fails does.

    Args:
        sweep: What to make.
        out: The sweep's folder: absent, empty, or one of the same sweep.
        allow_change: Go on although settings of runs differ from those the sweep was started with.
        after_run: Called on the main rank with the folder of each run that has come to its end now.

    Returns:
        `runs`: name, seed, folder and state of each.

    Raises:
        UsageError: `out` holds something else, or a sweep with other settings; a run cannot be made.
        StoppedError: A signal came; everything is saved.
        DivergenceError: All of the runs diverged.
        ScionError: Whatever a run raises; it stands in its status.json and in the sweep's.
    """
    with stoppable(out) as (stop, ranks), contextlib.ExitStack() as held:

        def begin() -> list[Record]:
            held.enter_context(claimed_folder(out))
            with ended_early(out):
                return _begin(sweep, out, allow_change)

        runs = ranks.on_main(begin)  # which alone looks into folders, so that all do the same
        with _status_kept(sweep, out, ranks):
            _make(runs, out, _Making(stop, ranks, allow_change, after_run))
        return ranks.on_main(lambda: _result(sweep, out))


def _make(runs: list[Record], out: Path, making: _Making) -> None:
    """Make the runs that `_begin` has listed."""
    lost: list[str] = []
    for number, run in enumerate(runs, start=1):
        making.stop.check()
        folder = Path(run["folder"])
        if run["done"]:
            say(f"{folder} is finished already")
        elif run["diverged"]:
            say(f"{folder} diverged earlier; to try it again change its settings, with --allow-change")
            lost.append(run["folder"])
        elif key := next((key for key, needed in run["needs"].items() if needed in lost), None):
            warn(f"run {folder.name} is left out: run {Path(run['needs'][key]).name}, its {key}, diverged")
            lost.append(run["folder"])
        else:
            say(f"run {folder.name} ({number} of {len(runs)})")
            lost += [] if _make_one(Recipe.model_validate(run["recipe"]), folder, making) else [run["folder"]]
    if len(lost) == len(runs):
        raise DivergenceError(f"all runs of {out} diverged; lower optimizer.lr, or look at the data")


def _make_one(recipe: Recipe, folder: Path, making: _Making) -> bool:
    """Make one run; return whether it came to its end, and did not diverge."""
    sound = True
    try:
        with _named(folder.name):
            run_within(recipe, folder, making.stop, making.ranks, making.allow_change)
    except DivergenceError as error:
        warn(f"{error}; the sweep goes on with the next run")
        sound = False
    gc.collect()  # what a run leaves in cycles would lie in the next one's memory

    def tell() -> None:
        making.after_run(folder)

    making.ranks.on_main(tell)
    return sound


@contextlib.contextmanager
def _status_kept(sweep: Sweep, out: Path, ranks: Ranks) -> Generator[None, None, None]:
    """Write into status.json how the block ends."""

    def write(state: str, exit_code: int = 0, message: str = "") -> None:
        if ranks.is_main:
            write_status(out, state, exit_code, " ".join(message.split())[:500], _steps(sweep, out))

    write("running")
    try:
        yield
    except BaseException as error:
        write("stopped" if isinstance(error, StoppedError) else "failed", exit_code_of(error), str(error))
        raise
    write("done")


def _steps(sweep: Sweep, out: Path) -> int:
    """Return the optimizer steps of all runs together, as far as they have got."""
    found = (one.folder / "status.json" for one in _places(sweep, out))
    return sum(int(read_json(path).get("step") or 0) for path in found if path.exists())


def _result(sweep: Sweep, out: Path) -> Record:
    runs: list[Record] = []
    for one in _places(sweep, out):
        status = one.folder / "status.json"
        state = read_json(status)["state"] if status.exists() else "waiting"
        state = "diverged" if one.diverged else state
        runs.append({"name": one.run.name, "seed": one.recipe.seed, "folder": str(one.folder), "state": state})
    return {"recipe": "sweep", "runs": runs}


def _begin(sweep: Sweep, out: Path, allow_change: bool) -> list[Record]:
    """Check everything that can be checked before the first run, write down the sweep, and list the runs to make."""
    if not (out / "status.json").exists():
        write_status(out, "running", 0, "", 0)  # from here on the folder is known as a sweep's
    _check_changes(sweep, out, allow_change)
    if any(run.parents for run in sweep.chosen):
        with silenced():
            plan_sweep(sweep)  # shapes of what is yet to be trained: a run that cannot be is refused now
    placed = _with_demo_data(sweep, out, _places(sweep, out))
    names = [run.folder for run in sweep.chosen]
    made_now = [one.folder for one in placed if one.run.folder in names]
    runs: list[Record] = []
    for one in placed:
        with _named(one.folder.name):
            unchanged = _check_run(one, made_now, allow_change)
        if one.folder in made_now:
            runs.append({
                "folder": str(one.folder),
                "recipe": one.recipe.model_dump(mode="json"),
                "needs": {key: str(folder) for key, folder in one.needs.items()},
                "done": one.began and is_done(one.folder),
                "diverged": one.diverged and unchanged,
            })  # fmt: skip
    seeds = sorted({one.recipe.seed for one in placed})
    write_manifest(out, placed[0].recipe, {"seeds": seeds}, allow_change)
    write_text_atomic(out / "config.yaml", dump_yaml(sweep.config))
    return runs


def _places(sweep: Sweep, out: Path) -> list[_Placed]:
    """Return all runs of a sweep with their folders, and a run's result as source where it is asked for.

    What is made before the runs for all of them to begin with, in a run folder of its own, becomes their source here.
    """
    folders = {run.folder: _folder_of(run, out) for run in sweep.runs}
    placed: list[_Placed] = []
    for run in sweep.runs:
        update: Record = {}
        needs: dict[str, Path] = {}
        for place, name in run.parents.items():
            named = sweep.named(name, run)
            assert named is not None
            needs[place] = folders[named.folder]
            folder = folders[named.folder].resolve()  # in full: the same command may be given again in another place
            section, _, key = place.partition(".")
            if key:
                update[section] = getattr(run.recipe, section).model_copy(update={key: str(folder)})
            else:
                update[section] = str(folder / "model")
        placed.append(_Placed(run, run.recipe.model_copy(update=update), folders[run.folder], needs))
    return placed


def _folder_of(run: SweepRun, out: Path) -> Path:
    """Return a run's folder; one that was made before the sweep got more seeds, or fewer, stays where it is."""
    own = out / RUNS / run.folder
    others = (out / RUNS / name for name in (run.name, f"{run.name}-seed{run.recipe.seed}"))
    if not own.exists():
        for other in others:
            path = other / "config.yaml"
            if path.exists() and load_yaml(path).get("seed") == run.recipe.seed:
                return other
    return own


def _with_demo_data(sweep: Sweep, out: Path, placed: list[_Placed]) -> list[_Placed]:
    """Return the runs with the demo's data in RUN/data, prepared once, where they name none and share a tokenizer."""

    def lacks(one: _Placed) -> bool:
        return not one.began and any(stage.data.dir is None for stage in one.recipe.resolved_stages)

    first = [_first_recipe(sweep, one.run) for one in placed if lacks(one)]
    if len({(str(recipe.source), str(recipe.model)) for recipe in first}) != 1:
        return placed
    folder = with_data(first[0], out.resolve()).data.dir

    def filled(one: _Placed) -> _Placed:
        data = one.recipe.data.model_copy(update={"dir": folder})
        return _Placed(one.run, one.recipe.model_copy(update={"data": data}), one.folder, one.needs)

    return [filled(one) if lacks(one) else one for one in placed]


def _first_recipe(sweep: Sweep, run: SweepRun) -> Recipe:
    """Return the recipe of the run that a run descends from: itself where its source is a MODEL, or none."""
    parent = sweep.parent_of(run)
    return _first_recipe(sweep, parent) if parent else run.recipe


def _check_changes(sweep: Sweep, out: Path, allow_change: bool) -> None:
    """Refuse a folder of another kind, and changes that are not allowed in runs that have not begun.

    Raises:
        UsageError: As said; the message names runs and keys.
    """
    path = out / "config.yaml"
    if not path.exists():
        return
    saved = load_yaml(path)
    if saved.get("recipe") != "sweep":
        raise UsageError(f"{out} holds a run of recipe {saved.get('recipe')}, not a sweep; use another folder")
    before = {(run.name, run.recipe.seed): run.recipe for run in read_sweep(saved, str(path)).runs}
    now = {(run.name, run.recipe.seed): (run.recipe, _folder_of(run, out)) for run in sweep.runs}
    words = [f"run {name} (seed {seed}) is gone" for name, seed in before if (name, seed) not in now]
    for key, (recipe, folder) in now.items():
        if key in before and not (folder / "config.yaml").exists():  # of those that began their own folder decides
            words += [f"run {key[0]}: {text}" for text in _differences(before[key], recipe)]
    if words and not allow_change:
        raise UsageError(
            f"{out} was started with other settings: {', '.join(words)}; use another folder or --allow-change"
        )
    if words:
        warn(f"settings changed: {', '.join(words)}")


def _differences(before: Recipe, now: Recipe) -> list[str]:
    old, new = (flatten(recipe.model_dump(mode="json")) for recipe in (before, now))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key} ({old.get(key)!r} -> {new.get(key)!r})" for key in keys]


def _check_run(one: _Placed, made_now: list[Path], allow_change: bool) -> bool:
    """Check what would else show only when a run's turn comes; return whether it was begun with the same settings.

    Raises:
        ScionError: It cannot be made.
    """
    if one.began:
        with silenced():  # it is said when the run goes on
            settled = settle_recipe(one.recipe, one.folder, allow_change)
        return not _differences(Recipe.model_validate(load_yaml(one.folder / "config.yaml")), settled)
    if one.folder not in made_now:
        return False
    paths = timed_paths(one.recipe.model_dump(mode="json"))
    ramps_by_time = any(path[-2:] == ("ramp", "over") for path in paths)  # in steps when its turn comes
    if not one.needs and not ramps_by_time and all(stage.data.dir for stage in one.recipe.resolved_stages):
        inputs = open_inputs(one.recipe, one.folder, check=False)
        with silenced():  # of padding, which is said when its turn comes
            check_enough(inputs.recipe, inputs.plan)
    for key, folder in one.needs.items():
        if folder not in made_now and not is_done(folder):
            name = RUN_PREFIX + one.run.parents[key]
            raise UsageError(f"its {key} {name} is not there yet; name that run in only too")
    return False


@contextlib.contextmanager
def _named(name: str) -> Generator[None, None, None]:
    """Put a run's name before what goes wrong in it."""
    try:
        yield
    except StoppedError:
        raise
    except ScionError as error:
        raise type(error)(f"run {name}: {error}") from error
