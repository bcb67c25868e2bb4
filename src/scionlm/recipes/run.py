"""A run folder from start to finish: claim it, write down what will be done, do it, and say how it ended."""

import contextlib
import datetime
import shlex
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pydantic

from scionlm.core.config import Mapping, dump_yaml, load_yaml
from scionlm.core.errors import DataError, NewerFormatError, StoppedError, UsageError, exit_code_of
from scionlm.core.files import folder_lock, require_free_folder, storage_error, write_bytes_atomic, write_text_atomic
from scionlm.core.log import say, warn
from scionlm.core.machine import git_commit, versions
from scionlm.core.records import Record, read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.parallel.ranks import Ranks, joined, naming_losses
from scionlm.recipes.changes import judge_changes
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_shear import BUDGETS
from scionlm.recipes.inputs import Inputs, open_inputs
from scionlm.recipes.lengths import Path as Place
from scionlm.recipes.lengths import has_times, set_at, timed_paths, value_at
from scionlm.recipes.origin import REFERENCE
from scionlm.recipes.selection import ANALYSIS, IMPORTANCE
from scionlm.recipes.timing import resolve_times
from scionlm.train.folders import checkpoint_folders

_RECORDS = ("status.json", "config.yaml", "manifest.json")
_STATES = ("running", "stopped", "done", "failed")
# What may change while a run goes on; everything else decides what its finished phases measured.
_CHANGEABLE = ("train.", "optimizer", "schedule.", "stages", "average", "evaluate.every", "export.")
# What may change without a word, for it changes no result.
_FREE = ("checkpoint.", "track", "train.parallel")

# What a failure must not take away: a run that has begun, and what was measured before it could.
_LASTING = ("config.yaml", ANALYSIS, IMPORTANCE, REFERENCE)

# What a run resolves when it starts: section, key, and the value that leaves it open.
_AUTOMATIC = (
    ("data", "dir", None),
    ("train", "precision", "auto"),
    ("train", "compile", "auto"),
    ("train", "micro_batch_size", "auto"),
)

Work = Callable[[Inputs, Path, StopRequest, Ranks, bool], Record]


def run_recipe(recipe: Recipe, out: Path, allow_change: bool = False) -> Record:
    """Run a recipe into the folder `out`, or go on with it, and return its result.

    Args:
        recipe: What to do.
        out: The run folder: absent, empty, or one of the same recipe.
        allow_change: Go on although settings differ from those the run started with.

    Raises:
        UsageError: `out` holds something else, or a run with other settings.
        StoppedError: A signal came; the run is saved.
        ScionError: Whatever the work raises; it stands in status.json too.
    """
    with stoppable(out) as (stop, ranks):
        return run_within(recipe, out, stop, ranks, allow_change)


@contextlib.contextmanager
def stoppable(out: Path) -> Generator[tuple[StopRequest, Ranks], None, None]:
    """Join the other processes of a run, where there are some, and note signals; say how a stopped run goes on.

    Raises:
        StoppedError: The block was stopped; the message has the command that goes on.
    """
    with joined(lambda error: _note_failure(out, error)) as ranks:
        stop = StopRequest(None if ranks.world == 1 else lambda mine: any(ranks.gather(mine)))
        try:
            with stop:
                yield stop, ranks
        except StoppedError as error:
            start = "scion" if ranks.world == 1 else "torchrun ... -m scionlm"
            words = sys.argv[1:] or ["run", str(out / "config.yaml"), "-o", str(out)]
            raise StoppedError(f"{error}; to go on: {start} {shlex.join(words)}") from error


def run_within(recipe: Recipe, out: Path, stop: StopRequest, ranks: Ranks, allow_change: bool = False) -> Record:
    """Run a recipe into `out` among processes that are joined already, maybe as a part of a larger run.

    All ranks have to call; see `run_recipe`.
    """
    with contextlib.ExitStack() as held:
        opened: list[Inputs] = []

        def begin() -> Record | None:
            held.enter_context(claimed_folder(out))
            with ended_early(out):
                return _begin(recipe, out, allow_change, ranks, opened)

        settled = ranks.on_main(begin)
        if settled is None:
            return ranks.on_main(lambda: read_json(out / "result.json"))
        own = opened[0] if opened else None
        inputs = ranks.together(lambda: own or open_inputs(Recipe.model_validate(settled), out, check=False))
        work = _work_of(recipe)
        if ranks.is_main:
            return _carry_out(work, inputs, out, stop, ranks, allow_change)
        with naming_losses(ranks):
            return work(inputs, out, stop, ranks, allow_change)


def _begin(recipe: Recipe, out: Path, allow_change: bool, ranks: Ranks, opened: list[Inputs]) -> Record | None:
    """Check the request and put the opened inputs into `opened`; return the settled recipe, None where it is done."""
    if not (out / "status.json").exists():
        write_status(out, "running", 0, "")  # from here on the folder is known as a run's
    recipe = settle_recipe(recipe, out, allow_change)
    if is_done(out):
        say(f"{out} is finished already; nothing to do")
        return None
    if has_times(recipe.model_dump(mode="json")):
        from scionlm.recipes.calibrate import step_seconds

        recipe = resolve_times(recipe, [seconds / ranks.world for seconds in step_seconds(recipe, ranks)])
    opened.append(open_inputs(recipe, out))
    return opened[0].recipe.model_dump(mode="json")


@contextlib.contextmanager
def claimed_folder(out: Path) -> Generator[None, None, None]:
    """Hold the run folder; when the block fails before anything in it took long (`_LASTING`), take it away again.

    Raises:
        UsageError: `out` is neither a run nor free, or another process holds it.
        NewerFormatError: It is a newer Scion's run.
        StorageError: It cannot be made.
    """
    began = _is_run(out)
    if not began:
        require_free_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out) from error
    with folder_lock(out):  # only its holder may clear the folder
        try:
            yield
        except StoppedError:
            raise  # the same command goes on with what is there
        except BaseException:
            if not began and not any((out / name).exists() for name in _LASTING):
                # The folder was empty: everything in it is ours, but only what we know by name is taken away.
                for name in ("data", "tokenizer"):
                    shutil.rmtree(out / name, ignore_errors=True)
                for name in ("status.json", "manifest.json", ".lock"):
                    (out / name).unlink(missing_ok=True)
                for folder in made:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise


def _is_run(out: Path) -> bool:
    """Return whether `out` is a run folder: its status.json is one of Scion's.

    Raises:
        NewerFormatError: It is one of a newer Scion's.
    """
    if not (out / "status.json").exists():
        return False
    try:
        return read_json(out / "status.json").get("state") in _STATES
    except NewerFormatError:
        raise
    except DataError:
        return False


def is_done(out: Path) -> bool:
    """Return whether the run in `out` is finished."""
    return (out / "status.json").exists() and read_json(out / "status.json")["state"] == "done"


@contextlib.contextmanager
def ended_early(out: Path) -> Generator[None, None, None]:
    """Write into status.json how a beginning ends that does not come through; a request refused leaves it as it is."""
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        if (out / "status.json").exists() and not is_done(out):
            _note_failure(out, error, int(read_json(out / "status.json").get("step") or 0))
        raise


def _work_of(recipe: Recipe) -> Work:
    """Return what a recipe's name stands for, and with it torch: only once the request is sound."""
    from scionlm.recipes.continual import run_continual
    from scionlm.recipes.inheritune import run_inheritune
    from scionlm.recipes.scratch import run_scratch
    from scionlm.recipes.shear import run_shear

    works: dict[str, Work] = {
        "inheritune": run_inheritune,
        "shear": run_shear,
        "continual": run_continual,
        "scratch": run_scratch,
    }
    return works[recipe.recipe]


def _carry_out(work: Work, inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks, allow_change: bool) -> Record:
    began = (out / "config.yaml").exists()
    kept = {path: path.read_bytes() for name in _RECORDS if (path := out / name).exists()}
    before = _last_step(out)
    write_status(out, "running", 0, "")
    try:
        with naming_losses(ranks):
            result = work(inputs, out, stop, ranks, allow_change)
    except UsageError as error:
        if began and _last_step(out) == before:  # a request that is refused leaves the run as it was
            for path, data in kept.items():
                write_bytes_atomic(path, data)
        else:
            _note_failure(out, error)
        raise
    except BaseException as error:
        _note_failure(out, error)
        raise
    write_status(out, "done", 0, "")
    return result


def _note_failure(out: Path, error: BaseException, step: int | None = None) -> None:
    """Say in status.json that the run has failed, or was stopped."""
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    write_status(out, state, exit_code_of(error), " ".join(str(error).split())[:500], step)


def write_status(out: Path, state: str, exit_code: int, message: str, step: int | None = None) -> None:
    """Write RUN/status.json: what other programs look at."""
    step = _last_step(out) if step is None else step
    write_json(out / "status.json", {"state": state, "exit_code": exit_code, "step": step, "message": message})


def _last_step(out: Path) -> int:
    if (out / "result.json").exists():
        return int(read_json(out / "result.json")["training"]["steps"])
    phases = (out, out / "prune", *out.glob("prune/step-*"), *out.glob("rounds/round-*"))  # each counts from zero
    found = ([step for step, _ in checkpoint_folders(phase / "checkpoints")] for phase in phases)
    return sum(max(steps, default=0) for steps in found)


def settle_recipe(recipe: Recipe, out: Path, allow_change: bool) -> Recipe:
    """Return the recipe of the run folder: the given one, with what `auto` was resolved to when the run started.

    Raises:
        UsageError: Settings differ from the ones that the run started with; the message names them.
    """
    path = out / "config.yaml"
    if not path.exists():
        return recipe
    try:
        saved = Recipe.model_validate(load_yaml(path))
    except pydantic.ValidationError as error:
        raise UsageError(f"{path} is not a recipe that this Scion reads; use another folder") from error
    config = _with_resolved(recipe.model_dump(mode="json"), saved.model_dump(mode="json"))
    given, kept = flatten(config), flatten(saved.model_dump(mode="json"))
    changed = [key for key in sorted(given.keys() | kept.keys()) if given.get(key) != kept.get(key)]
    if not changed:
        return saved
    words = ", ".join(f"{key} ({kept.get(key)!r} -> {given.get(key)!r})" for key in changed)
    free = all(key.startswith(_FREE) for key in changed)
    fixed = [key for key in changed if not key.startswith(_CHANGEABLE + _FREE)]
    if given.get("average.method") == "start" != kept.get("average.method"):
        fixed.append("average.method")  # the first weights are not there any more
    if is_done(out):
        raise UsageError(f"{out} is finished, with other settings: {words}; use another folder")
    if fixed:
        raise UsageError(
            f"{out} was started with other settings: {words}; {fixed[0]} cannot change, use another folder"
        )
    if not (allow_change or free):
        raise UsageError(f"{out} was started with other settings: {words}; use another folder or --allow-change")
    warn(f"settings changed: {words}")
    return Recipe.model_validate(config)


def _with_resolved(given: Mapping, kept: Mapping) -> Mapping:
    """Return a recipe with what was resolved when the run started: `auto`, missing places, and times."""
    for section, key, open_value in (*_AUTOMATIC, ("branch", "step", None)):
        if value_at(given, (section, key)) == open_value and given.get(section) and kept.get(section):
            given[section][key] = kept[section][key]
    target = given.get("target") or {}
    if any(target.get(name) is not None for name in ("shape", *BUDGETS)):  # sizes that a budget or a name came to
        given["target"] = {key: (kept.get("target") or {}).get(key) if v is None else v for key, v in target.items()}
    for number, _ in enumerate(given["stages"]):
        path = ("stages", number, "train", "micro_batch_size")
        if value_at(given, path) == "auto" and _same_stage(given, kept, path) and value_at(kept, path) is not None:
            set_at(given, path, value_at(kept, path))
    for path in timed_paths(given):
        same = _same_stage(given, kept, path)
        budget = (*path[:-1], "time")
        if path[-1] == "steps":
            same = same and value_at(given, budget) == value_at(kept, budget)
        if same and value_at(kept, path) is not None:
            set_at(given, path, value_at(kept, path))
    return given


def _same_stage(given: Mapping, kept: Mapping, path: Place) -> bool:
    """Return whether a place is in a stage of the same name in both, or in none."""
    return path[0] != "stages" or value_at(given, (*path[:2], "name")) == value_at(kept, (*path[:2], "name"))


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def command_line() -> list[str]:
    """Return the command as it was typed; empty when Scion was called from Python."""
    return ["scion", *sys.argv[1:]] if Path(sys.argv[0]).name in ("scion", "scionlm", "__main__.py") else []


def write_config(recipe: Recipe, out: Path) -> None:
    """Write RUN/config.yaml: the recipe with everything resolved."""
    write_text_atomic(out / "config.yaml", dump_yaml(recipe.model_dump(mode="json")))


def write_manifest(out: Path, recipe: Recipe, facts: Record, allow_change: bool = False) -> None:
    """Write RUN/manifest.json: what made this run; the first start's is kept when a run goes on, with what changed.

    Raises:
        UsageError: The run was started with other weights or data, or with something else that changes the result.
    """
    path = out / "manifest.json"
    made_by = {"versions": versions(), "git_commit": git_commit()}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if path.exists():
        before = read_json(path)
        last = before.get("changes", [{}])[-1].get("to", before)
        changes = judge_changes(last, made_by | facts, str(out), allow_change)
        if changes:
            entry = {"at": now, "changed": [str(change) for change in changes], "to": made_by | facts}
            write_json(path, before | {"changes": [*before.get("changes", []), entry]})
        return
    manifest = {
        "scion_version": versions().get("scionlm"),
        "command": command_line() or ["scion", "run", str(out / "config.yaml")],
        "started_at": now,
        "seeds": {"seed": recipe.seed},
    }
    write_json(path, manifest | made_by | facts)
