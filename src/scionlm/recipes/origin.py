"""The model that a recipe begins with: a MODEL, a reference that it trains first, or a shape to fill from scratch."""

from dataclasses import fields
from pathlib import Path

from scionlm.core.config import Mapping, nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import say
from scionlm.data import DataFolder
from scionlm.families import ModelShape, family_of
from scionlm.recipes.config import Recipe
from scionlm.recipes.demo_data import demo_corpora, prepare_demo_data
from scionlm.recipes.model_shapes import SHAPE, TargetShape, model_config
from scionlm.sources import ModelFolder, open_folder, resolve

REFERENCE = "reference"
"""Folder of the reference's own run inside RUN, and its name."""


def open_source(recipe: Recipe, out: Path | None, weights: bool = True) -> ModelFolder:
    """Return the model that a recipe begins with; where it is not trained yet, its configuration and tokenizer.

    Args:
        recipe: The recipe, with its data's folder where its model has no configuration of its own.
        out: The run folder; None where there is none.
        weights: Bring a hub model's weights here too.

    Raises:
        UsageError: A local path that is not there, or a configuration that no model can have.
        DataError: The model is broken.
    """
    if recipe.source is not None:
        found = resolve(recipe.source, weights=weights)
        ModelShape.of(found.config, found.path / "config.json")  # a broken file is refused before anything reads it
        return found
    if recipe.reference is None:
        return _shape(recipe.model or {}, recipe, "model")
    trained = None if out is None else out / REFERENCE / "model"
    if trained is not None and (trained / "config.json").exists():
        return open_folder(trained, REFERENCE)
    return _shape(recipe.reference.model, recipe, "reference.model")


def _shape(model: Mapping, recipe: Recipe, where: str) -> ModelFolder:
    """Return a configuration as a folder without weights: the tokenizer is the data's."""
    place = recipe.resolved_stages[0].data.dir
    config, path = model_config(model), Path()
    if place is not None and (Path(place) / "index.json").exists():
        data = DataFolder(Path(place))
        config, path = model_config(model, data.tokenizer.vocab_size), data.tokenizer_folder
        for key in ("bos_token_id", "eos_token_id"):
            config.setdefault(key, data.tokenizer.separator_id)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{where}.model_type is required: the family, such as llama or gpt2")
    if "vocab_size" not in config:
        raise UsageError(f"{where}.vocab_size is required where data.dir names no prepared data")
    try:
        ModelShape.of(config)
    except DataError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('config.json: ')}") from error
    name = REFERENCE if where.startswith(REFERENCE) else model.get(SHAPE, config["model_type"])
    return ModelFolder(path, name, config)


def model_of(recipe: Recipe) -> tuple[Mapping, str] | None:
    """Return the configuration that a recipe trains from random weights first, and the key that it stands at."""
    if recipe.model is not None:
        return recipe.model, "model"
    return None if recipe.reference is None else (recipe.reference.model, "reference.model")


def check_model_keys(model: Mapping, where: str) -> None:
    """Refuse what `check_model` does, without its seconds where all keys are sizes that Scion itself reads.

    Raises:
        UsageError: A key is none of the family's, or transformers cannot make a model of them.
    """
    family = family_of(model_config(model))
    sizes = {family.key(each.name) for each in fields(TargetShape)}
    if set(model) - sizes - family.defaults.keys() - {SHAPE, "model_type", "vocab_size", "max_position_embeddings"}:
        check_model(model, where)


def check_model(model: Mapping, where: str) -> None:
    """Refuse a configuration that transformers cannot make a model of, and keys that it would silently ignore.

    Raises:
        UsageError: It is one.
    """
    from transformers import AutoConfig

    model = model_config(model)
    if not isinstance(model.get("model_type"), str):
        raise UsageError(f"{where}.model_type is required: the family, such as llama or gpt2")
    try:
        family = family_of(model)
        known = [*AutoConfig.for_model(model["model_type"]).to_dict(), *family.defaults]
        for key in model:
            if key not in known:
                raise UsageError(f"{where}.{key} is no setting of {model['model_type']}{nearest(key, known)}")
        ModelShape.of({"vocab_size": 1} | model)
        import torch

        from scionlm.families.models import empty_model

        with torch.device("meta"):
            empty_model(dict(model), torch.float32)
    except DataError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('config.json: ')}") from error


def with_data(recipe: Recipe, out: Path) -> Recipe:
    """Return a recipe with its data's folder; the demo's text is prepared in RUN/data where it names none.

    Raises:
        UsageError: A model that is to be trained from scratch on it does not say how large its vocabulary is.
    """
    if all(stage.data.dir is not None for stage in recipe.resolved_stages):
        return recipe
    if recipe.source is not None:
        tokenizer = resolve(recipe.source).name
    else:
        tokenizer = str(_own_tokenizer(recipe, out / "tokenizer"))
    say("no data.dir: training on the demo's text")
    prepare_demo_data(tokenizer, out / "data")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(out / "data")})})


def _own_tokenizer(recipe: Recipe, folder: Path) -> Path:
    """Return the folder of a tokenizer made from the demo's text, as large as the model's vocabulary."""
    from scionlm.data.preparing.train_tokenizer import train_tokenizer

    size = model_config(recipe.model or (recipe.reference.model if recipe.reference else {})).get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool):
        where = "model" if recipe.model else "reference.model"
        raise UsageError(f"{where}.vocab_size is required where data.dir names no prepared data")
    if not folder.exists():
        train_tokenizer(demo_corpora(None), Path(), folder, size)
    return folder
