"""Read a run folder into values that the page can rely on.

A run may still be running, or have stopped or failed, and older or newer runs write other keys: whatever is absent or
of another type becomes None (or an empty collection), and the page says so. A file that is there but broken is an
error of its own: a page drawn from the rest of the folder would mislead.

    config.yaml   -> Run.config, Run.config_text      result.json  -> Run.source, Run.child, Run.control, ...
    manifest.json -> Run.manifest                     metrics.jsonl, control/metrics.jsonl -> Trained.curves
    status.json   -> Run.status                       rounds.json -> Run.growth
    source.json   -> Run.source, before there is a result
    result.json, else manifest.json -> Run.upstream
    analysis/analysis.json, else analysis-child/analysis.json -> Run.analysis
    ledger.jsonl, else stages/*/ledger.jsonl -> Run.mixing
    prune/result.json (else masks.json), prune/metrics.jsonl, prune/step-*/metrics.jsonl -> Run.pruning
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scionlm.core.config import parse_yaml
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json, read_jsonl
from scionlm.report.curves import Curves, read_curves
from scionlm.report.growth_read import folder_of_result, own_lines
from scionlm.report.mixture_read import Mixing, read_mixing
from scionlm.report.values import integer, mapping, number, text

_MAX_STRETCHES = 100

# A strategy that is measured leaves an analysis of the source in the first; then one of the child needs the other.
_ANALYSES = ("analysis", "analysis-child")

# Larger than any recipe; beyond it a file is not a recipe, and parsing it would only cost time.
_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True)
class Loss:
    """The loss on one domain; what was not recorded is None."""

    nll: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    num_tokens: float | None = None


Losses = Mapping[str, Loss]


@dataclass(frozen=True)
class Status:
    """Where the run stands; state is `unknown` where no status was written."""

    state: str = "unknown"
    exit_code: int | None = None
    step: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class Source:
    """The model that was inherited from."""

    name: str | None = None
    model_type: str | None = None
    num_layers: int | None = None
    num_parameters: float | None = None
    license: str | None = None
    losses: Losses = field(default_factory=dict)


@dataclass(frozen=True)
class Inherit:
    """What was taken from the source; `init` is source or random.

    `cut` has the sizes of the source that the child has less of; None where that is not recorded.
    """

    init: str | None = None
    strategy: str | None = None
    reason: str | None = None
    keep: tuple[int, ...] = ()
    fresh: tuple[str, ...] = ()
    cut: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Trained:
    """One model that was trained: the child, or its control."""

    name: str | None
    before: Losses
    after: Losses
    best: Mapping[str, tuple[float | None, int | None]]
    training: Mapping[str, Any]
    curves: Curves


@dataclass(frozen=True)
class Pruning:
    """What comes before the training of a run that prunes.

    Attributes:
        record: What it came to, as far as that is written.
        stretches: The course of each stretch of training in it, in order; each counts steps and tokens from zero.
    """

    record: Mapping[str, Any]
    stretches: tuple[Curves, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the losses of what is left are known: they are measured last."""
        return bool(mapping(self.record.get("domains")))

    @property
    def tokens(self) -> float:
        """Tokens that it was trained on, so far or at all."""
        spent = number(mapping(self.record.get("training")), "tokens")
        so_far = sum(one.last_tokens or 0.0 for one in self.stretches)
        return spent if spent is not None and math.isfinite(spent) else so_far


@dataclass(frozen=True)
class Sample:
    """One prompt and how each model went on."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A run folder as read.

    `upstream` names those of its domains that the model knew before, as far as is known; `scores` are the records of
    source, child and control that hold `tasks` and `items`; `analysis` is one that sets the child beside its source,
    empty where there is none, and `analysis_name` the folder in which it is, or could be; `tokens_before` are those of
    rounds of growth that the child's own weights have not been through.
    """

    folder: str
    recipe: str | None
    status: Status
    source: Source | None
    inherit: Inherit
    shape: Mapping[str, Any]
    child: Trained
    control: Trained | None
    samples: tuple[Sample, ...]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    finished: bool
    plan: Mapping[str, Any] = field(default_factory=dict)
    growth: Mapping[str, Any] = field(default_factory=dict)
    pruning: Pruning | None = None
    upstream: tuple[str, ...] = ()
    forgetting: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mixing: Mixing = field(default_factory=Mixing)
    analysis: Mapping[str, Any] = field(default_factory=dict)
    analysis_name: str = _ANALYSES[0]
    tokens_before: float = 0.0

    @property
    def continues(self) -> bool:
        """Whether it goes on training a whole model on other text."""
        return self.recipe == "continual"

    @property
    def phases(self) -> list[tuple[str, Curves]]:
        """The course of each phase of training, in order, with its name; one that is all there is has none."""
        if self.pruning is None:
            return [("", self.child.curves)]
        parts = self.pruning.stretches
        names = ["While pruning"] if len(parts) == 1 else [f"While pruning, step {k + 1}" for k in range(len(parts))]
        return [*zip(names, parts, strict=True), ("In the recovery", self.child.curves)]

    @property
    def start(self) -> str:
        """What the child was before it was trained as what it is, in words."""
        return "before training" if self.pruning is None else "right after pruning"


def read_run(folder: Path) -> Run:
    """Return what the run folder holds so far.

    Raises:
        UsageError: `folder` is not a folder, or holds no run.
        DataError: A file in it is broken or of a newer format.
    """
    known = ("config.yaml", "manifest.json", "status.json", "metrics.jsonl", "result.json")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the folder of a run")
    if not any((folder / name).is_file() for name in known):
        raise UsageError(f"{folder} is not a run folder: it holds none of {', '.join(known)}")
    config, config_text = read_config(folder / "config.yaml")
    result = _read_optional(folder / "result.json")
    control_result = mapping(result.get("control")) or _read_optional(folder / "control" / "result.json")
    control_curves = _read_metrics(folder / "control" / "metrics.jsonl")
    growth = _read_optional(folder / "rounds.json")
    lines, tokens_before = own_lines(_lines_of(_metrics_of(folder)), growth, config)
    child = _trained(result, read_curves(lines))
    manifest = _read_optional(folder / "manifest.json")
    analysis_name, analysis = _read_analysis(folder)
    has_control = bool(control_result) or bool(control_curves.train or control_curves.domains)
    status = _status(_read_optional(folder / "status.json"))
    return Run(
        folder=folder.resolve().name,
        recipe=text(result, "recipe") or text(config, "recipe"),
        status=status,
        source=_source(mapping(result.get("source")) or _read_optional(folder / "source.json"), config),
        inherit=_inherit(mapping(result.get("inherit")), config),
        shape=mapping(result.get("model")),
        child=child,
        control=_trained(control_result, control_curves) if has_control else None,
        samples=tuple(_samples(result.get("samples"))),
        manifest=manifest,
        config=config,
        config_text=config_text,
        # A child's result is there before its control is trained.
        finished=bool(result) and status.state in ("done", "unknown"),
        plan=_read_optional(folder / "plan.json"),
        growth=growth,
        tokens_before=tokens_before,
        pruning=_read_pruning(folder / "prune", mapping(result.get("prune")), config),
        upstream=_names(result.get("upstream", manifest.get("upstream_domains"))),
        forgetting=mapping(result.get("forgetting")),
        scores={
            "child": result,
            "source": mapping(result.get("source")),
            "control": mapping(result.get("control")),
        },
        mixing=read_mixing(folder_of_result(folder, growth) or _metrics_of(folder).parent),
        analysis=analysis,
        analysis_name=analysis_name,
    )


def _names(found: object) -> tuple[str, ...]:
    listed = list(found) if isinstance(found, list | dict) else []
    return tuple(dict.fromkeys(name for name in listed if isinstance(name, str)))


def _read_pruning(folder: Path, record: Mapping[str, Any], config: Mapping[str, Any]) -> Pruning | None:
    """Return what came before the training; None of a run that does not prune, whatever lies in its folder."""
    if not record and not mapping(config.get("prune")):
        return None
    record = record or _read_optional(folder / "result.json") or _read_optional(folder / "masks.json")
    steps = sorted(folder.glob("step-*/metrics.jsonl"))[:_MAX_STRETCHES]
    whole = folder / "metrics.jsonl"
    return Pruning(record, tuple(_read_metrics(path) for path in ([whole] if whole.is_file() else steps)))


def _read_analysis(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the name and record of an analysis of two models; without one, the name of a folder that is free."""
    for name in _ANALYSES:
        record = _read_optional(folder / name / "analysis.json")
        if mapping(record.get("against")):
            return name, record
    free = (name for name in _ANALYSES if not (folder / name / "analysis.json").is_file())
    return next(free, _ANALYSES[-1]), {}


def _metrics_of(folder: Path) -> Path:
    """Return where a run's metrics are: of rounds of growth that go on, in the folder of the newest."""
    rounds = sorted(folder.glob("rounds/round-*/metrics.jsonl"))
    own = folder / "metrics.jsonl"
    return rounds[-1] if rounds and not own.is_file() else own


def _read_optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_metrics(path: Path) -> Curves:
    return read_curves(_lines_of(path))


def _lines_of(path: Path) -> Sequence[Mapping[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def read_config(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return what a config.yaml holds, and its text; both empty where it is not there.

    Raises:
        DataError: It is broken, or no recipe.
    """
    if not path.is_file():
        return {}, ""
    raw = path.read_bytes()
    if len(raw) > _CONFIG_BYTES:
        raise DataError(f"{path} has {len(raw):,} bytes; a recipe has at most {_CONFIG_BYTES:,}")
    try:
        content = raw.decode("utf-8")
        return mapping(parse_yaml(content, str(path))), content
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; restore it, or remove it to draw the rest") from error
    except UsageError as error:
        raise DataError(f"{error}; restore it, or remove it to draw the rest") from error


def _status(record: Mapping[str, Any]) -> Status:
    return Status(
        state=text(record, "state") or "unknown",
        exit_code=integer(record, "exit_code"),
        step=integer(record, "step"),
        message=text(record, "message"),
    )


def _source(record: Mapping[str, Any], config: Mapping[str, Any]) -> Source | None:
    """The source as measured, or as named in the recipe where nothing was measured yet."""
    name = text(record, "name") or text(config, "source")
    if not record and name is None:
        return None
    return Source(
        name=name,
        model_type=text(record, "model_type"),
        num_layers=integer(record, "num_hidden_layers"),
        num_parameters=number(record, "num_parameters"),
        license=text(record, "license"),
        losses=losses_in(record.get("domains")),
    )


def _inherit(record: Mapping[str, Any], config: Mapping[str, Any]) -> Inherit:
    planned = mapping(config.get("inherit"))
    keep, fresh = record.get("keep"), record.get("fresh")
    sizes = mapping(mapping(record.get("width")).get("sizes"))
    cut = {name: was for name, size in sizes.items() if (was := number(mapping(size), "source")) is not None}
    return Inherit(
        init=text(record, "init") or text(planned, "init"),
        strategy=text(record, "strategy"),
        reason=text(record, "strategy_reason"),
        keep=tuple(index for index in keep if _is_index(index)) if isinstance(keep, list) else (),
        fresh=tuple(part for part in fresh if isinstance(part, str)) if isinstance(fresh, list) else (),
        cut=cut if "width" in record else None,
    )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def losses_in(record: object) -> Losses:
    """Return the losses by domain that a record holds."""
    return {name: _loss(mapping(value)) for name, value in mapping(record).items()}


def _loss(record: Mapping[str, Any]) -> Loss:
    return Loss(
        nll=number(record, "nll"),
        perplexity=number(record, "perplexity"),
        bits_per_byte=number(record, "bits_per_byte"),
        num_tokens=number(record, "num_tokens"),
    )


def _trained(record: Mapping[str, Any], curves: Curves) -> Trained:
    best = {name: mapping(value) for name, value in mapping(record.get("best")).items()}
    return Trained(
        name=text(record, "name"),
        before=losses_in(record.get("before")),
        after=losses_in(record.get("domains")),
        best={name: (number(value, "nll"), integer(value, "step")) for name, value in best.items()},
        training=mapping(record.get("training")),
        curves=curves,
    )


def _samples(records: object) -> Iterable[Sample]:
    for record in records if isinstance(records, list) else []:
        texts = {name: value for name, value in mapping(mapping(record).get("texts")).items() if isinstance(value, str)}
        if texts:
            yield Sample(prompt=text(mapping(record), "prompt") or "", texts=texts)
