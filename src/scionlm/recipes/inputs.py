"""What every recipe starts from: source and data opened and checked against the recipe, before torch is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import sha256_file
from scionlm.core.log import warn
from scionlm.data import DataFolder
from scionlm.data.mixing.ledger import LEDGER
from scionlm.data.tokenizer import largest_id
from scionlm.families import ModelShape, family_of
from scionlm.families.shape import context_length, learned_positions
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_distill import SOURCE
from scionlm.recipes.lengths import timed_paths
from scionlm.recipes.lr_scales import check_scales
from scionlm.recipes.order import Sampling, check_supply, replayed_data, sampling_of
from scionlm.recipes.origin import check_model, model_of, open_source, with_data
from scionlm.recipes.reference import reference_recipe
from scionlm.recipes.references import given_references
from scionlm.recipes.rounds import check_growth, goes_on, round_shapes
from scionlm.recipes.selection import plan_of
from scionlm.recipes.shear_steps import with_target
from scionlm.recipes.stages import Stage
from scionlm.recipes.teacher_layers import layer_map
from scionlm.sources import ModelFolder, load_tokenizer, resolve
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.plan import SurgeryPlan
from scionlm.train.folders import checkpoint_folders
from scionlm.train.metrics import require_trackers


@dataclass(frozen=True)
class StageInputs:
    """A stage with its data opened and checked.

    Attributes:
        stage: The stage.
        data: The prepared text.
        sampling: How samples are drawn from it.
        prior: Weights of domains that moving ones are led back to; None takes those that sampling begins with.
        hands_on: Weights move after the last step too: what comes next begins with those.
    """

    stage: Stage
    data: DataFolder
    sampling: Sampling
    prior: Mapping[str, float] | None = None
    hands_on: bool = False


@dataclass(frozen=True)
class Inputs:
    """A recipe with its inputs opened and checked.

    Attributes:
        recipe: With `data.dir` filled in.
        source: The model to inherit from; without weights where a model of its shape begins from scratch, or is the
            reference and not trained yet.
        stages: What is trained on, stage by stage.
        held_out: What is evaluated: name to data folder and domain.
        plan: What to keep of the source; before anything is measured, what stands in for it (`selection.plan_of`).
        branched: The checkpoint that the run begins with, where it does and has not begun.
        teacher: The model that is learned from, where one is.
        taught_layers: Layer of the student to the layer of the teacher whose output it learns to give.
        upstream: Which of `held_out` the model knew before: they are not trained on, or replayed only.
    """

    recipe: Recipe
    source: ModelFolder
    stages: list[StageInputs]
    held_out: dict[str, tuple[DataFolder, str]]
    plan: SurgeryPlan
    branched: dict[str, Any] | None
    teacher: ModelFolder | None = None
    taught_layers: dict[int, int] = field(default_factory=lambda: {})
    upstream: tuple[str, ...] = ()

    @property
    def data(self) -> DataFolder:
        """The first stage's data."""
        return self.stages[0].data

    @property
    def domains(self) -> list[str]:
        """The names of what is evaluated."""
        return list(self.held_out)


def open_inputs(recipe: Recipe, out: Path, check: bool = True) -> Inputs:
    """Open source and data and check that they fit the recipe and each other.

    Args:
        recipe: What is asked for.
        out: The run folder, where the demo's data is prepared when the recipe names none.
        check: Look at everything; else at what has to be there, since another process has looked at the rest.

    Raises:
        UsageError: The layers or domains asked for are not there.
        DataError: Source and data were made with different tokenizers, or a domain is too short.
    """
    if check and (made := model_of(recipe)) is not None:
        check_model(*made)
    if check and recipe.reference is not None:
        reference_recipe(recipe)  # a wrong key is refused before text is prepared
    recipe = with_data(recipe, out)
    source = open_source(recipe, out)
    recipe = with_target(recipe, source)
    teacher = open_teacher(recipe, source)
    for model in (source,) if teacher is None or teacher is source else (source, teacher):
        check_text(recipe, model)
    plan = plan_of(recipe, source)
    check_growth(recipe, plan, source)
    check_scales(recipe, source, plan)
    taught_layers = match_layers(recipe, source, teacher, plan)
    require_trackers(recipe.track)
    branched = None
    if recipe.branch and not checkpoint_folders(out / "checkpoints"):
        from scionlm.train.checkpoint import find_checkpoint  # and with it torch: only where it is needed this early

        checkpoint = find_checkpoint(Path(recipe.branch.run), recipe.branch.step)
        step = int(checkpoint.state["step"])
        branched = {"step": step, "sha256": sha256_file(checkpoint.path / "manifest.json")}
        recipe = recipe.model_copy(update={"branch": recipe.branch.model_copy(update={"step": step})})
    stages = [_open_stage(stage, recipe.seed, out) for stage in recipe.resolved_stages]
    before = [_open_stage(recipe.pruning_stage, recipe.seed, out)] if recipe.pruning_stage is not None else []
    held_out = _held_out([*stages, *before])
    known = known_before(recipe, stages)
    upstream = _add_upstream(held_out, known)
    if check:
        _check(source, teacher, stages, held_out, _in_turn(recipe, plan, before, stages))
        for data, _ in known:
            check_tokenizer(source, data)
    return Inputs(recipe, source, stages, held_out, plan, branched, teacher, taught_layers, upstream)


def _in_turn(
    recipe: Recipe, plan: SurgeryPlan, before: list[StageInputs], stages: list[StageInputs]
) -> list[StageInputs]:
    """Return every stretch of training, in the order in which they go through the text."""
    return stages * len(round_shapes(recipe, plan)) if goes_on(recipe) else [*before, *stages]


def check_enough(recipe: Recipe, plan: SurgeryPlan) -> None:
    """Refuse beforehand what would run out of text, as far as that is there, and its windows are counted at once.

    A budget in time has no steps yet, and best_fit would pack all documents.

    Args:
        recipe: The recipe.
        plan: The layers of its model, or of its first round's.

    Raises:
        UsageError: Replay would begin a second pass, or a domain is not there.
        DataError: A domain would be exhausted where the recipe says to stop, or is shorter than a window.
    """
    pruning, paths = recipe.pruning_stage, timed_paths(recipe.model_dump(mode="json"))
    all_stages = [*([] if pruning is None else [pruning]), *recipe.resolved_stages]
    if any(path[-2:] in (("train", "steps"), ("ramp", "over")) for path in paths):
        return
    if any(stage.data.packing == "best_fit" or not _is_there(stage) for stage in all_stages):
        return
    before, stages = (
        [_open_stage(stage, recipe.seed, Path()) for stage in some]
        for some in (all_stages[: pruning is not None], recipe.resolved_stages)
    )
    check_supply([(one.stage, one.sampling) for one in _in_turn(recipe, plan, before, stages)])


def _is_there(stage: Stage) -> bool:
    """Return whether a stage's text is prepared, and what it replays was trained on."""
    folders, replay = [stage.data.dir], stage.replay
    if replay is not None and replay.stage is None:
        if replay.run is not None and not (Path(replay.run) / LEDGER).is_file():
            return False
        folders += [replay.data] if replay.data is not None else []
    return all(folder is not None and (Path(folder) / "index.json").exists() for folder in folders)


def from_source(inputs: Inputs, source: ModelFolder) -> Inputs:
    """Return the inputs with the source as it is now: a reference that has been trained since.

    Raises:
        UsageError: The recipe does not fit it.
    """
    recipe = inputs.recipe
    teacher, plan = open_teacher(recipe, source), plan_of(recipe, source)
    layers = match_layers(recipe, source, teacher, plan)
    return replace(inputs, source=source, teacher=teacher, plan=plan, taught_layers=layers)


def _check(
    source: ModelFolder,
    teacher: ModelFolder | None,
    stages: list[StageInputs],
    held_out: dict[str, tuple[DataFolder, str]],
    trained: list[StageInputs],
) -> None:
    """Check that there is enough data for all that is `trained` in turn, whole, and of the models' tokenizer."""
    check_supply([(inputs.stage, inputs.sampling) for inputs in trained])
    folders = [inputs.data for inputs in stages]
    known = {folder.fingerprint for folder in folders}
    folders += [inputs.data for inputs in trained if inputs.data.fingerprint not in known]
    folders += [earlier for inputs in stages if (earlier := replayed_data(inputs.sampling)) is not None]
    for folder in {folder.fingerprint: folder for folder in folders}.values():
        check_tokenizer(source, folder)
        if teacher is not None and teacher is not source:
            _check_teacher(teacher, folder)
    for data, domain in held_out.values():
        for split in ("train", "held_out"):
            data.stream(domain, split, verify=True)
    for folder in folders[len(stages) :]:
        for domain in folder.domains:
            folder.stream(domain, "train", verify=True)


def open_teacher(recipe: Recipe, source: ModelFolder, weights: bool = True) -> ModelFolder | None:
    """Return the model that a recipe learns from; None where it learns from text alone.

    Args:
        recipe: The recipe.
        source: Its source, which is the teacher where it names no other.
        weights: Bring its weights here too.
    """
    if recipe.distill is None or not recipe.has_teacher:
        return None
    name = recipe.distill.teacher
    found = source if name == SOURCE else resolve(name, weights=weights)
    ModelShape.of(found.config, found.path / "config.json")  # a broken file is refused before anything reads it
    return source if found.path.resolve() == source.path.resolve() else found  # the same model by another name


def match_layers(recipe: Recipe, source: ModelFolder, teacher: ModelFolder | None, plan: SurgeryPlan) -> dict[int, int]:
    """Return which layer of the child learns from which of the teacher's; none where hidden states are not learned.

    Raises:
        UsageError: The recipe names a layer that is not there.
    """
    if teacher is None or recipe.distill is None:
        return {}
    return layer_map(recipe.distill, teacher, plan_origins([source], plan))


def check_length(seq_len: int, model: ModelFolder, key: str) -> None:
    """Refuse windows that are longer than a model's learned positions; say where it was not made for them."""
    learned, made_for = learned_positions(model.config), context_length(model.config)
    if learned is not None and seq_len > learned:
        raise UsageError(f"{key} {seq_len}: {model.name} has {learned} positions")
    if made_for is not None and seq_len > made_for:
        warn(f"{key} {seq_len} is longer than the {made_for} positions that {model.name} was made for")


def check_text(recipe: Recipe, model: ModelFolder) -> None:
    """Refuse sequences that a model cannot read."""
    family = family_of(model.config)
    before = [recipe.pruning_stage] if recipe.pruning_stage is not None else []
    for stage in [*before, *recipe.resolved_stages]:
        if stage.data.document_mask and not family.packs_documents:
            raise UsageError(f"data.document_mask: {model.config['model_type']} models do not keep documents apart")
    check_length(max(stage.data.seq_len for stage in (*before, *recipe.resolved_stages)), model, "data.seq_len")


def _open_stage(stage: Stage, seed: int, out: Path) -> StageInputs:
    assert stage.data.dir is not None
    data = DataFolder(Path(stage.data.dir))
    sampling = sampling_of(stage, data, seed, out)
    if stage.reweight and stage.reweight.reference not in ("source", "best"):
        given_references(stage.reweight, sampling.domains)
    return StageInputs(stage, data, sampling)


def _held_out(stages: list[StageInputs]) -> dict[str, tuple[DataFolder, str]]:
    """Return every domain of every stage once; one whose name another folder's has, with the stage's name after it."""
    found: dict[str, tuple[DataFolder, str]] = {}
    for inputs in stages:
        for domain in inputs.sampling.domains:
            place = (inputs.data, domain)
            known = {(data.fingerprint, name) for data, name in found.values()}
            if (inputs.data.fingerprint, domain) not in known:
                found[domain if domain not in found else f"{domain}@{inputs.stage.name}"] = place
    return found


def known_before(recipe: Recipe, stages: list[StageInputs]) -> list[tuple[DataFolder, str]]:
    """Return the domains that the model knew before: data folder and name of each.

    Raises:
        UsageError: One of them is not there, or none is left.
    """
    asked = recipe.upstream
    if asked is None:
        if recipe.recipe != "continual":
            return []
        first = _with_replay(recipe, stages[0])
        replayed = replayed_data(first)
        return [] if replayed is None else [(replayed, name) for name in first.replayed_domains()]
    data = DataFolder(Path(asked.dir)) if asked.dir is not None else stages[0].data
    trained = {name for one in stages if one.data.fingerprint == data.fingerprint for name in one.sampling.domains}
    data.require(asked.domains or [], "upstream.domains:")
    found = asked.domains or [name for name in data.domains if asked.dir is not None or name not in trained]
    if not found:
        raise UsageError(
            f"upstream: every domain of {data.path} is trained on; name a folder as upstream.dir, or upstream.domains"
        )
    return [(data, name) for name in found]


def _with_replay(recipe: Recipe, first: StageInputs) -> Sampling:
    """Return how a first stage draws, and would replay, where the share of what is replayed is nothing."""
    if first.stage.replay is not None or recipe.replay is None or recipe.replay.fraction:
        return first.sampling
    replays = first.stage.model_copy(update={"replay": recipe.replay})
    return sampling_of(replays, first.data, recipe.seed, Path())


def _add_upstream(held_out: dict[str, tuple[DataFolder, str]], known: list[tuple[DataFolder, str]]) -> tuple[str, ...]:
    """Add what the model knew before to what is evaluated, and return its names there."""
    names = {(data.fingerprint, domain): name for name, (data, domain) in held_out.items()}
    found: list[str] = []
    for data, domain in known:
        name = names.get((data.fingerprint, domain)) or (domain if domain not in held_out else f"{domain}@upstream")
        held_out.setdefault(name, (data, domain))
        found.append(name)
    return tuple(found)


def check_tokenizer(source: ModelFolder, data: DataFolder) -> None:
    """Check that the data's ids mean to the source what they meant to the tokenizer that made them."""
    if not _shares_tokenizer(source, data):
        raise DataError(
            f"the data in {data.path} was made with the tokenizer of {data.tokenizer.name!r}, which is not that of "
            f"{source.name!r}; prepare it again with tokenizer: {source.name}"
        )
    if (token := _without_embedding(source, data)) is not None:
        raise DataError(
            f"{source.name!r} has no embedding for token {token} of its tokenizer, which the data in {data.path} may "
            "hold; prepare the data again with the tokenizer that the model was made with, or give a model from "
            f"scratch model.vocab_size={token + 1}"
        )


def _check_teacher(teacher: ModelFolder, data: DataFolder) -> None:
    if not _shares_tokenizer(teacher, data) or _without_embedding(teacher, data) is not None:
        raise DataError(
            f"distill.teacher {teacher.name!r} has another tokenizer than {data.tokenizer.name!r}, which made the data "
            f"in {data.path}: their next tokens cannot be compared; choose a teacher that shares it"
        )


def _without_embedding(model: ModelFolder, data: DataFolder) -> int | None:
    """Return the largest token id that data may hold, where a model has no embedding for it."""
    rows = ModelShape.of(model.config, model.path / "config.json").vocab_size
    if data.tokenizer.vocab_size <= rows:
        return None
    largest = largest_id(load_tokenizer(data.tokenizer_folder), data.tokenizer)
    return largest if largest >= rows else None


def _shares_tokenizer(model: ModelFolder, data: DataFolder) -> bool:
    return load_tokenizer(model.path).get_vocab() == load_tokenizer(data.tokenizer_folder).get_vocab()
