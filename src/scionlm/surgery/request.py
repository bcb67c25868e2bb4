"""What a user can ask of surgery, in one place: the command line's flags and the keywords of `scion.inherit`."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, TypedDict, get_args

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import check_version
from scionlm.families import ModelShape, family_of
from scionlm.families.shape import expected_tensors
from scionlm.sources import ModelFolder
from scionlm.sources.folder import read_json_object
from scionlm.surgery.depth import GROWTH, GrowthInit, parse_keep, plan_depth, plan_growth
from scionlm.surgery.lineage import inherited_layers
from scionlm.surgery.plan import SurgeryPlan, parse_parts
from scionlm.surgery.vocabulary import match_tokenizer, padding_to
from scionlm.surgery.width import Scores, WidthTarget, plan_width, random_scores

BLOCK_INFLUENCE = "block_influence"
Importance = Literal["first", "random", "magnitude", "activation", "taylor"]
IMPORTANCE = get_args(Importance)
_MEASURED = (BLOCK_INFLUENCE, "activation", "taylor")


class InheritOptions(TypedDict, total=False):
    """What may be asked for; what is left out, or None, stays as it is in the source."""

    layers: int | None
    """How many layers the result has."""
    keep: str | list[int] | None
    """Which layers, as a list or as `0-7,12` or `0-29:2`."""
    strategy: str | None
    """How to choose `layers` of them: a name in `surgery.depth.STRATEGIES`, or `block_influence`, measured on data."""
    scores: list[float] | str | None
    """One number a layer, the highest are kept; or a JSON file with `layer_scores`, as `scion analyze` writes it."""
    repeat: bool
    """Whether `keep` may name a layer twice."""
    grow: GrowthInit | None
    """Add layers until there are `layers`: `source_next`, `stack`, `zero_output` or `random`."""
    donor: str | None
    """For `grow="source_next"`: the model that the layers come from."""
    hidden_size: int | None
    """Channels of the residual stream."""
    intermediate_size: int | None
    """Channels of the MLP."""
    num_attention_heads: int | None
    """Query heads."""
    num_key_value_heads: int | None
    """Key/value heads."""
    importance: str | None
    """Which heads and channels stay: `first`, `magnitude`, `activation` or `taylor`."""
    data: str | None
    """Data folder that `block_influence`, `activation` and `taylor` are measured on."""
    tokenizer: str | None
    """Folder of a tokenizer made of the source's tokens, to trim the vocabulary to."""
    vocab_size: int | None
    """Trim the source's own tokenizer to this many tokens."""
    pad_vocab_to: int | None
    """Pad the vocabulary to a multiple of this."""
    fresh: str | None
    """Parts to initialize anew instead of inheriting them, as `mlp,mlp_norm`."""
    seed: int
    """Of everything fresh."""
    allow_pickle: bool
    """Convert foreign `.bin` weights (`torch.load(weights_only=True)`)."""


def width_target(options: InheritOptions) -> WidthTarget:
    """Return the sizes that options ask for."""
    return WidthTarget(
        options.get("hidden_size"),
        options.get("intermediate_size"),
        options.get("num_attention_heads"),
        options.get("num_key_value_heads"),
    )


def check_options(options: InheritOptions) -> None:
    """Refuse options that mean nothing as they stand.

    Raises:
        UsageError: One is empty, or asks for something that another one does not leave room for.
    """
    for key in ("strategy", "scores", "grow", "donor", "importance", "data", "tokenizer", "fresh", "keep"):
        if options.get(key) in ("", []):
            raise UsageError(f"{key}: nothing is named; leave it out or name something")
    importance = options.get("importance")
    if importance is not None and importance not in IMPORTANCE:
        known = ", ".join(IMPORTANCE)
        raise UsageError(
            f"importance {importance!r} is unknown{nearest(importance, list(IMPORTANCE))} (known: {known})"
        )
    if importance is not None and width_target(options).is_empty:
        raise UsageError(
            "importance chooses heads and channels, but no size is to be cut; say which (hidden_size, ...)"
        )
    measured = [rule for rule in (options.get("strategy"), importance) if rule in _MEASURED]
    if measured and options.get("data") is None:
        raise UsageError(f"{measured[0]} is measured on text; give a data folder made by scion prepare (--data)")
    if options.get("data") is not None and not measured:
        raise UsageError(f"data is what {', '.join(_MEASURED)} are measured on; without one of them leave it out")


def layer_plan(options: InheritOptions, source: ModelFolder, donor: ModelFolder | None) -> SurgeryPlan:
    """Return the plan for the layers alone.

    Raises:
        UsageError: The request contradicts itself or the source.
        DataError: A file of scores is broken.
    """
    total = ModelShape.of(source.config).num_hidden_layers
    layers, keep, seed = options.get("layers"), options.get("keep"), options.get("seed") or 0
    grow = options.get("grow")
    if donor is not None and grow != "source_next":
        raise UsageError("a donor is only for grow: source_next")
    if options.get("repeat") and keep is None:
        raise UsageError("repeat lets keep name a layer twice; without keep it means nothing")
    if grow is not None:
        if grow not in GROWTH:
            raise UsageError(f"grow {grow!r} is unknown{nearest(grow, list(GROWTH))} (known: {', '.join(GROWTH)})")
        if layers is None or any(options.get(key) is not None for key in ("keep", "strategy", "scores")):
            raise UsageError("grow needs layers, the number to reach, and neither keep, strategy nor scores")
        names = [source.name] if donor is None else [source.name, donor.name]
        count = None if donor is None else ModelShape.of(donor.config).num_hidden_layers
        inherited = None if donor is None else inherited_layers(source, donor)
        return plan_growth(names, total, layers, grow, inherited, count, seed)
    scores = options.get("scores")
    values = layer_scores(Path(scores)) if isinstance(scores, str) else scores
    strategy = options.get("strategy")
    if (layers, keep, strategy, values) == (None, None, None, None):
        others = ("tokenizer", "vocab_size", "pad_vocab_to", "fresh")
        if width_target(options).is_empty and all(options.get(key) is None for key in others):
            raise UsageError("nothing is asked for: say how many layers to keep (layers), which (keep), or other sizes")
        return plan_depth(total, total, name=source.name)
    indices = parse_keep(keep) if isinstance(keep, str) else keep
    repeat = bool(options.get("repeat"))
    return plan_depth(total, layers, indices, strategy, values, repeat=repeat, name=source.name)


def layer_scores(path: Path) -> list[float]:
    """Return the scores in a JSON file with a list `layer_scores`.

    Raises:
        UsageError: There is no such file.
        DataError: It holds no list of numbers.
    """
    if not path.is_file():
        raise UsageError(f"scores: {path} is not a file")
    record = read_json_object(path)
    if "format_version" in record:
        check_version(record, path)
    values = record.get("layer_scores")
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise DataError(f"{path} has no layer_scores, a list with one number for each layer")
    try:
        return [float(value) for value in values]
    except OverflowError as error:
        raise DataError(f"{path}: a layer score is too large for a number") from error


def complete_plan(
    plan: SurgeryPlan,
    options: InheritOptions,
    source: ModelFolder,
    scores: Scores | None,
    vocab: tuple[int, ...] | None = None,
) -> SurgeryPlan:
    """Return a plan of layers with width, vocabulary and fresh parts added.

    Args:
        plan: The layers.
        options: What is asked for.
        source: The first donor.
        scores: Importance of heads and channels; None keeps the first ones, or draws.
        vocab: Rows of a vocabulary that was trimmed already; None looks at `options`.

    Raises:
        UsageError: The request contradicts itself or the source.
        DataError: Scores or tokenizer do not fit the source.
    """
    family, shape = family_of(source.config), ModelShape.of(source.config)
    changes = {"seed": options.get("seed") or 0}
    rule = options.get("importance") or "first"
    if rule != "first" and any(layer.donor for layer in plan.layers):
        raise UsageError(
            f"importance: {rule} scores one model, but layers come from two; cut the width in a second step"
        )
    if rule == "random":
        scores = random_scores(shape, changes["seed"])
    plan = plan_width(plan, family, shape, width_target(options), scores, rule)
    tokenizer = options.get("tokenizer")
    if tokenizer is not None:
        if options.get("vocab_size") is not None:
            raise UsageError("give either tokenizer or vocab_size; each says which tokens stay")
        if not Path(tokenizer).is_dir():
            raise UsageError(f"tokenizer: {tokenizer} is not a folder with a tokenizer.json")
        vocab = match_tokenizer(source.path, Path(tokenizer))
    if vocab is not None and max(vocab) >= shape.vocab_size:
        raise DataError(
            f"{source.name}: its tokenizer has a token of number {max(vocab)}, but there are only {shape.vocab_size} "
            "embeddings; leave such tokens out of a smaller tokenizer, or take the one that belongs to the model"
        )
    rows = shape.vocab_size if vocab is None else len(vocab)
    multiple = options.get("pad_vocab_to")
    padding = 0 if multiple is None else padding_to(rows, multiple)
    fresh = options.get("fresh")
    parts = parse_parts(fresh) if fresh else ()
    there = {place.spec.part for place in expected_tensors(source.config)}
    absent = [part for part in parts if part not in there]
    if absent:
        raise UsageError(f"fresh: {source.name} has no {absent[0]} of its own (it has: {', '.join(sorted(there))})")
    return replace(plan, vocab=vocab, vocab_padding=padding, fresh=parts, **changes)
