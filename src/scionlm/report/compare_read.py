"""Read what is compared: a row for each model that was trained or measured, from run folders alone."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scionlm.core.errors import DivergenceError, UsageError
from scionlm.core.records import Record
from scionlm.report.collect import Losses, Run, Trained, read_config, read_run
from scionlm.report.curves import thinned
from scionlm.report.findings import known, last_losses
from scionlm.report.pruning_read import method_of
from scionlm.report.settings_read import settings_of, without_seed
from scionlm.report.values import integer, mapping, number, text

_RUN_FILES = ("config.yaml", "status.json", "result.json", "metrics.jsonl")
_RUNS = "runs"
_MAX_POINTS = 80  # of a line: enough for every turn at the width of a page, for many lines
# What of a recipe says nothing about what is measured, beside the seed; and paths, for which hashes stand.
_UNTOLD = ("seed", "checkpoint", "track", "control", "evaluate")
_UNTOLD_TRAIN = ("parallel", "micro_batch_size", "compile")


@dataclass(frozen=True)
class Setup:
    """How losses were measured; what is not recorded is None, and agrees with anything."""

    domains: frozenset[str] = frozenset()
    num_tokens: tuple[tuple[str, int], ...] | None = None
    data: str | None = None
    seq_len: int | None = None

    def difference(self, usual: "Setup") -> str | None:
        """Return in words why losses do not compare with those of another setup, None where they do."""
        if self.domains != usual.domains:
            return "other domains"
        mine, theirs = dict(self.num_tokens or ()), dict(usual.num_tokens or ())
        for name in sorted(mine.keys() & theirs.keys()):
            if mine[name] != theirs[name]:
                return f"losses of {mine[name]:,} tokens a domain, not of {theirs[name]:,}"
        if None not in (self.data, usual.data) and self.data != usual.data:
            return "other data"
        if None not in (self.seq_len, usual.seq_len) and self.seq_len != usual.seq_len:
            return f"windows of {self.seq_len} tokens, not of {usual.seq_len}"
        return None


@dataclass(frozen=True)
class Base:
    """A source: the model that others were made from."""

    name: str
    num_layers: int | None
    num_parameters: float | None
    losses: Mapping[str, float]
    key: str


@dataclass(frozen=True)
class Row:
    """A model that was trained or measured.

    Attributes:
        name: Unique in the comparison.
        kind: `run`, `control` (the one inside a run), or `model`.
        state: done, running, stopped, failed, diverged or unknown.
        folder: The run's; of a control that of its run.
        devices: How many it ran on: its cost is their number times the seconds.
        losses: Final ones in nats by domain; of what is not done the last so far.
        curve: Tokens and mean loss over the domains.
        base: The source, as far as its losses are known.
        source_path: Where the recipe takes the source from.
        signature: The same for runs that differ by their seed alone.
        grown: Whether it is what rounds of growth have come to; tokens, operations and time are of all of them.
        pruned: How it was pruned, None where it was not; tokens, operations and time count the pruning.
        pruning_tokens: Those that it was pruned on; its curve begins behind them.
        recipe: Name of its recipe.
        upstream: Those of its domains that the model knew before, as far as it says.
        settings: What it may hang on what it forgets, in words.
        scores: What holds its `tasks`, `items`, `suites` and `inference`, as far as they are there.
        source_scores: The same of its source.
        control_of: Of a control, the folders of the runs whose own control it is; equal ones are one row.
    """

    name: str
    kind: str
    state: str
    folder: Path
    seed: int | None = None
    init: str | None = None
    shape: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int | None = None
    num_parameters: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    devices: int = 1
    losses: Mapping[str, float] = field(default_factory=dict)
    setup: Setup = Setup()
    curve: Sequence[tuple[float, float]] = ()
    base: Base | None = None
    source_path: str | None = None
    signature: str = ""
    grown: bool = False
    pruned: str | None = None
    pruning_tokens: float = 0.0
    recipe: str | None = None
    upstream: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    source_scores: Mapping[str, Any] = field(default_factory=dict)
    control_of: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        """Whether its losses are final."""
        return self.state == "done"

    @property
    def continues(self) -> bool:
        """Whether it goes on training a whole model on other text."""
        return self.recipe == "continual" and self.kind == "run"

    @property
    def is_control(self) -> bool:
        """Whether it began from random weights in a source's shape, as a whole."""
        return self.kind == "control" or (self.kind == "run" and self.init == "random" and not self.grown)

    @property
    def base_name(self) -> str:
        """Its name without its seed, which a sweep has put behind it, or a person behind the sweep."""
        return "/".join(part.removesuffix(f"-seed{self.seed}") for part in self.name.split("/"))


def is_run(folder: Path) -> bool:
    """Return whether a path is the folder of a run or of a sweep."""
    return folder.is_dir() and any((folder / name).is_file() for name in _RUN_FILES)


def is_sweep(folder: Path) -> bool:
    """Return whether a path is the folder of a sweep.

    Raises:
        DataError: Its config.yaml is broken.
    """
    return read_config(folder / "config.yaml")[0].get("recipe") == "sweep"


def _runs_in(sweep: Path) -> list[Path]:
    folders = sorted((sweep / _RUNS).iterdir()) if (sweep / _RUNS).is_dir() else []
    return [one for one in folders if one.is_dir() and any((one / name).is_file() for name in _RUN_FILES)]


def run_folders(items: Iterable[Path]) -> list[Path]:
    """Return the run folders that items stand for, each once: a sweep stands for all its runs.

    Raises:
        UsageError: A sweep has no runs yet.
    """
    found: dict[Path, Path] = {}
    for item in items:
        folders = [item]
        if is_sweep(item):
            folders = _runs_in(item)
            if not folders:
                raise UsageError(f"{item} is a sweep without runs yet; compare it when one has begun")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_rows(folders: Sequence[Path], models: Sequence[Record] = ()) -> list[Row]:
    """Return a row for each run, for each control inside one, and for each model; equal controls once.

    Args:
        folders: Run folders.
        models: What was measured of plain models: name, model, domains, data, seq_len.

    Raises:
        UsageError: A folder holds no run.
        DataError: A file in one is broken.
    """
    rows: list[Row] = []
    for name, folder in zip(_names(folders), folders, strict=True):
        run = read_run(folder)
        child = _row(run, run.child, folder, name)
        rows.append(child)
        if run.control is not None:
            rows.append(_control(run, run.control, child))
    rows = _each_control_once(rows)
    for record in models:
        rows.append(_model(record, [row.name for row in rows]))
    return rows


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many of the folders above as it takes to tell them apart."""
    paths = [[part for part in folder.resolve().parts if part != _RUNS] for folder in folders]
    depth = [1] * len(paths)
    for _ in range(max((len(parts) for parts in paths), default=0)):
        names = ["/".join(parts[-d:]) for parts, d in zip(paths, depth, strict=True)]
        same = [names.count(name) > 1 for name in names]
        depth = [min(d + s, len(parts)) for d, s, parts in zip(depth, same, paths, strict=True)]
    return ["/".join(parts[-d:]) for parts, d in zip(paths, depth, strict=True)]


def _row(run: Run, child: Trained, folder: Path, name: str) -> Row:
    state = _state(run)
    losses = known(child.after) if state == "done" else {} if state == "diverged" else last_losses(child.curves)
    training = child.training
    seed = integer(training, "seed")
    spent = mapping(run.growth.get("total")) if run.finished else {}  # of all rounds of growth, not of the last alone
    spent = spent or training
    tokens, parameters = _finite(spent, "tokens"), _finite(run.shape, "num_parameters")
    before = run.pruning.tokens if run.pruning is not None else run.tokens_before
    return Row(
        name=name,
        kind="run",
        state=state,
        folder=folder,
        seed=integer(run.config, "seed") if seed is None else seed,
        init=run.inherit.init,
        shape=run.shape,
        num_layers=_layers(run),
        num_parameters=_finite(run.plan, "num_parameters") if parameters is None else parameters,
        tokens=_tokens_so_far(child, losses, before) if tokens is None else tokens,
        flops=_finite(spent, "flops"),
        seconds=_finite(spent, "seconds"),
        devices=integer(training, "devices") or 1,
        grown=bool(run.growth),
        losses=losses,
        setup=_setup(run, child.after),
        curve=_curve(child, before),
        pruned=method_of(run, run.pruning) or None if run.pruning is not None else None,
        pruning_tokens=before if run.pruning is not None else 0.0,
        base=_base(run),
        source_path=text(run.config, "source"),
        signature=_signature(run, folder),
        recipe=run.recipe,
        upstream=run.upstream,
        settings=settings_of(run),
        scores=run.scores.get("child", {}),
        source_scores=run.scores.get("source", {}),
    )


def _curve(trained: Trained, before: float = 0.0) -> list[tuple[float, float]]:
    return [(before + point.tokens, point.nll) for point in thinned(trained.curves.mean, _MAX_POINTS)]


def _tokens_so_far(trained: Trained, losses: Mapping[str, float], before: float) -> float | None:
    """Return the tokens that were trained on when the last losses were measured; else all so far."""
    measured = trained.curves.mean[-1].tokens if losses and trained.curves.mean else None
    so_far = trained.curves.last_tokens if measured is None else measured
    return before + (so_far or 0.0) if before else so_far


def _finite(record: Mapping[str, Any], key: str) -> float | None:
    value = number(record, key)
    return value if value is not None and math.isfinite(value) else None


def _state(run: Run) -> str:
    status = run.status
    if status.state == "failed" and status.exit_code == DivergenceError.exit_code:
        return "diverged"
    if status.state == "done":
        return "done" if run.finished else "unknown"
    return status.state if status.state in ("running", "stopped", "failed") else "unknown"


def _layers(run: Run) -> int | None:
    found = integer(run.shape, "num_hidden_layers")
    asked = integer(mapping(run.config.get("inherit")), "layers")
    asked = integer(mapping(run.config.get("target")), "num_hidden_layers") if asked is None else asked
    return asked if found is None else found


def _setup(run: Run, after: Losses) -> Setup:
    measured = after or (run.source.losses if run.source else {})
    counts = {name: loss.num_tokens for name, loss in measured.items()}
    domains = frozenset(measured) or frozenset(run.child.curves.domains)
    sound = bool(counts) and all(count is not None and math.isfinite(count) for count in counts.values())
    return Setup(
        domains,
        tuple(sorted((name, int(count or 0)) for name, count in counts.items())) if sound else None,
        _held_out(run.manifest),
        integer(mapping(run.config.get("data")), "seq_len"),
    )


def _held_out(manifest: Mapping[str, Any]) -> str | None:
    """Return the fingerprints of all data folders whose held-out text is measured: upstream, every stage, pruning."""
    stages = mapping(manifest.get("stages"))
    found = [text(mapping(manifest.get(key)), "fingerprint") for key in ("data", "upstream")]
    found += [text(mapping(stage), "data") for stage in stages.values()]
    return " + ".join(dict.fromkeys(one for one in found if one)) or None


def _base(run: Run) -> Base | None:
    source = run.source
    losses = known(source.losses) if source else {}
    if source is None or not losses:
        return None
    key = text(mapping(run.manifest.get("source")), "sha256") or source.name or "?"
    return Base(source.name or "source", source.num_layers, source.num_parameters, losses, key)


def _signature(run: Run, folder: Path) -> str:
    """Return the recipe and the data as text, without what differs between runs that are the same but for the seed."""
    if not run.config:
        return str(folder.resolve())
    config: dict[str, Any] = {key: value for key, value in run.config.items() if key not in _UNTOLD}
    config["train"] = {k: v for k, v in mapping(config.get("train")).items() if k not in _UNTOLD_TRAIN}
    config["data"] = {k: v for k, v in mapping(config.get("data")).items() if k != "dir"}
    for key, path in (("upstream", "dir"), ("replay", "run"), ("branch", "run")):
        if where := text(mapping(config.get(key)), path):
            config[key] = {**mapping(config.get(key)), path: without_seed(where)}
    source = text(run.config, "source")
    if source is not None:
        config["source"] = without_seed(source) if source.split("/")[-1] == "model" else source
    data = text(mapping(run.manifest.get("data")), "fingerprint")
    return json.dumps([config, data], sort_keys=True, default=str)


def _control(run: Run, control: Trained, child: Row) -> Row:
    training = control.training
    done = child.done and bool(control.after)
    tokens = _finite(training, "tokens")
    return replace(
        child,
        name=f"{child.name}/control",
        kind="control",
        state=child.state if done or not child.done else "unknown",
        init="random",
        pruned=None,
        pruning_tokens=0.0,
        tokens=control.curves.last_tokens if tokens is None else tokens,
        flops=_finite(training, "flops"),
        seconds=_finite(training, "seconds"),
        devices=integer(training, "devices") or 1,
        losses=known(control.after) if done else last_losses(control.curves),
        setup=replace(_setup(run, control.after), domains=child.setup.domains),
        curve=_curve(control),
        scores=run.scores.get("control", {}),
        signature=f"control {child.signature}",
    )


def _each_control_once(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without controls that another row is too; that one says whose it is."""
    owners: dict[int, list[Path]] = {}
    for k, row in enumerate(rows):
        if row.kind == "control":
            owners.setdefault(_same_control(row, rows, k), []).append(row.folder)
    kept = [(k, row) for k, row in enumerate(rows) if row.kind != "control" or k in owners]
    return [replace(row, control_of=tuple(owners.get(k, ()))) for k, row in kept]


def _same_control(row: Row, rows: Sequence[Row], place: int) -> int:
    """Return the place of the row that is the same control: the same shape, seed, tokens and losses; else its own."""

    def facts(one: Row) -> tuple[object, ...]:
        return dict(one.shape), one.seed, one.tokens, dict(one.losses), one.setup

    earlier = (k for k, one in enumerate(rows) if one.is_control and (k < place or one.kind == "run") and k != place)
    return next((k for k in earlier if facts(rows[k]) == facts(row)), place) if row.done else place


def _free(name: str, taken: Sequence[str]) -> str:
    """Return a model's name, told apart from those that there are already."""
    names = (name, f"{name} (model)", *(f"{name} (model {k})" for k in range(2, len(taken) + 2)))
    return next(one for one in names if one not in taken)


def _model(record: Record, taken: Sequence[str]) -> Row:
    shape = mapping(record.get("model"))
    domains = {name: mapping(loss) for name, loss in mapping(record.get("domains")).items()}
    losses = {name: nll for name, loss in domains.items() if (nll := number(loss, "nll")) is not None}
    name = text(record, "name") or "model"
    counts = tuple(sorted((domain, integer(loss, "num_tokens") or 0) for domain, loss in domains.items()))
    return Row(
        name=_free(name, taken),
        kind="model",
        state="done",
        folder=Path(name),
        shape=shape,
        num_layers=integer(shape, "num_hidden_layers"),
        num_parameters=_finite(shape, "num_parameters"),
        losses={name: nll for name, nll in losses.items() if math.isfinite(nll)},
        setup=Setup(frozenset(domains), counts, text(record, "data"), integer(record, "seq_len")),
        signature=f"model {name}",
    )
