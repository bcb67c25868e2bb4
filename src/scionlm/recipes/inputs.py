"""What every recipe starts from: source and data opened and checked against the recipe, before torch is loaded."""

from dataclasses import dataclass
from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.data import DataFolder
from scionlm.families import ModelShape, family_of
from scionlm.recipes.config import Recipe
from scionlm.recipes.demo_data import prepare_demo_data
from scionlm.recipes.order import Sampling, replayed_data, sampling_of
from scionlm.recipes.references import given_references
from scionlm.sources import ModelFolder, load_tokenizer, resolve
from scionlm.surgery.depth import parse_keep, plan_depth
from scionlm.surgery.plan import SurgeryPlan


@dataclass(frozen=True)
class Inputs:
    """A recipe with its inputs opened and checked.

    Attributes:
        recipe: With `data.dir` filled in.
        source: The model to inherit from.
        data: The prepared text.
        sampling: How samples are drawn from it.
        plan: The layers to keep.
    """

    recipe: Recipe
    source: ModelFolder
    data: DataFolder
    sampling: Sampling
    plan: SurgeryPlan

    @property
    def domains(self) -> list[str]:
        """The domains of the mixture."""
        return self.sampling.domains


def open_inputs(recipe: Recipe, out: Path) -> Inputs:
    """Open source and data and check that they fit the recipe and each other.

    Args:
        recipe: What is asked for.
        out: The run folder, where the demo's data is prepared when the recipe names none.

    Raises:
        UsageError: The layers or domains asked for are not there.
        DataError: Source and data were made with different tokenizers, or a domain is too short.
    """
    source = resolve(recipe.source)
    family = family_of(source.config)
    if recipe.data.document_mask and not family.packs_documents:
        raise UsageError(f"data.document_mask: {source.config['model_type']} models do not keep documents apart")
    inherit = recipe.inherit
    keep = parse_keep(inherit.keep) if isinstance(inherit.keep, str) else inherit.keep
    plan = plan_depth(
        ModelShape.of(source.config).num_hidden_layers, inherit.layers, keep, inherit.strategy, name=source.name
    )
    if recipe.data.dir is None:
        prepare_demo_data(source.name, out / "data")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(out / "data")})})
    assert recipe.data.dir is not None
    data = DataFolder(Path(recipe.data.dir))
    sampling = sampling_of(recipe, data)
    if recipe.reweight and recipe.reweight.reference not in ("source", "best"):
        given_references(recipe.reweight, sampling.domains)
    check_tokenizer(source, data)
    for domain in sampling.domains:
        for split in ("train", "held_out"):
            data.stream(domain, split, verify=True)
    earlier = replayed_data(sampling)
    if earlier is not None:
        check_tokenizer(source, earlier)
        for domain in earlier.domains:
            earlier.stream(domain, "train", verify=True)
    return Inputs(recipe, source, data, sampling, plan)


def check_tokenizer(source: ModelFolder, data: DataFolder) -> None:
    """Check that the data's ids mean to the source what they meant to the tokenizer that made them."""
    mine, theirs = load_tokenizer(source.path).get_vocab(), load_tokenizer(data.tokenizer_folder).get_vocab()
    if mine != theirs:
        raise DataError(
            f"the data in {data.path} was made with the tokenizer of {data.tokenizer.name!r}, which is not that of "
            f"{source.name!r}; prepare it again with tokenizer: {source.name}"
        )
    if data.tokenizer.vocab_size > int(source.config["vocab_size"]):
        raise DataError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the source only {source.config['vocab_size']}"
        )
