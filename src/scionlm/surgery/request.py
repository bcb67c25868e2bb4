"""What a user can ask of surgery, in one place: the command line's flags and the keywords of `scion.inherit`."""

from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json
from scionlm.families import ModelShape, family_of
from scionlm.families.shape import expected_tensors
from scionlm.sources import ModelFolder
from scionlm.surgery.depth import GrowthInit, parse_keep, plan_depth, plan_growth
from scionlm.surgery.plan import SurgeryPlan, parse_parts
from scionlm.surgery.vocabulary import match_tokenizer, padding_to
from scionlm.surgery.width import Scores, WidthTarget, plan_width


class InheritOptions(TypedDict, total=False):
    """What may be asked for; what is left out, or None, stays as it is in the source."""

    layers: int | None
    """How many layers the result has."""
    keep: str | list[int] | None
    """Which layers, as a list or as `0-7,12` or `0-29:2`."""
    strategy: str | None
    """How to choose `layers` of them: a name of `surgery.depth.STRATEGIES`."""
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
    """Data folder that `activation` and `taylor` are measured on."""
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


def layer_plan(options: InheritOptions, source: ModelFolder, donor: ModelFolder | None) -> SurgeryPlan:
    """Return the plan for the layers alone.

    Raises:
        UsageError: The request contradicts itself or the source.
        DataError: A file of scores is broken.
    """
    total = ModelShape.of(source.config).num_hidden_layers
    layers, keep, seed = options.get("layers"), options.get("keep"), options.get("seed") or 0
    grow = options.get("grow")
    if grow is not None:
        if (
            layers is None
            or keep is not None
            or options.get("strategy") is not None
            or options.get("scores") is not None
        ):
            raise UsageError("grow needs layers, the number to reach, and neither keep, strategy nor scores")
        names = [source.name] if donor is None else [source.name, donor.name]
        count = None if donor is None else ModelShape.of(donor.config).num_hidden_layers
        return plan_growth(names, total, layers, grow, inherited_layers(source), count, seed)
    if donor is not None:
        raise UsageError("a donor is only needed for grow: source_next")
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


def inherited_layers(folder: ModelFolder) -> list[int] | None:
    """Return which layers of its source a model of Scion's began with, by its provenance; None where it has none."""
    path = folder.path / "provenance.json"
    if not path.is_file():
        return None
    try:
        keep = read_json(path)["plan"]["keep"]
        return [int(index) for index in keep]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not say which layers the model was made of") from error


def layer_scores(path: Path) -> list[float]:
    """Return the scores in a JSON file with a list `layer_scores`.

    Raises:
        UsageError: There is no such file.
        DataError: It holds no list of numbers.
    """
    if not path.is_file():
        raise UsageError(f"scores: {path} is not a file")
    values = read_json(path).get("layer_scores")
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise DataError(f"{path} has no layer_scores, a list with one number for each layer")
    return [float(value) for value in values]


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
        scores: Importance of heads and channels; None keeps the first ones.
        vocab: Rows of a vocabulary that was trimmed already; None looks at `options`.

    Raises:
        UsageError: The request contradicts itself or the source.
        DataError: Scores or tokenizer do not fit the source.
    """
    family, shape = family_of(source.config), ModelShape.of(source.config)
    changes = {"seed": options.get("seed") or 0}
    rule = options.get("importance") or "first"
    plan = plan_width(plan, family, shape, width_target(options), scores, rule)
    tokenizer = options.get("tokenizer")
    if tokenizer is not None:
        if options.get("vocab_size") is not None:
            raise UsageError("give either tokenizer or vocab_size; each says which tokens stay")
        if not Path(tokenizer).is_dir():
            raise UsageError(f"tokenizer: {tokenizer} is not a folder with a tokenizer.json")
        vocab = match_tokenizer(source.path, Path(tokenizer))
    rows = shape.vocab_size if vocab is None else len(vocab)
    multiple = options.get("pad_vocab_to")
    padding = 0 if multiple is None else padding_to(rows, multiple)
    fresh = options.get("fresh")
    parts = parse_parts(fresh) if fresh else ()
    there = {place.spec.part for place in expected_tensors(family, source.config)}
    absent = [part for part in parts if part not in there]
    if absent:
        raise UsageError(f"fresh: {source.name} has no {absent[0]} of its own (it has: {', '.join(sorted(there))})")
    return replace(plan, vocab=vocab, vocab_padding=padding, fresh=parts, **changes)
