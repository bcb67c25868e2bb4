"""Write a model as a plain Hugging Face folder: weights, configuration, tokenizer, licence files, card, provenance."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scionlm.core.files import write_text_atomic
from scionlm.core.records import write_json
from scionlm.sources import ModelFolder
from scionlm.sources.folder import read_json_object
from scionlm.sources.quiet import quiet_transformers
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.target import remap_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_GENERATION = "generation_config.json"


def save_model(
    model: "PreTrainedModel",
    stage: Path,
    source: ModelFolder,
    plan: SurgeryPlan,
    card: str,
    provenance: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` into the staged folder `stage`.

    Args:
        model: The model; its weights are not changed.
        stage: An empty folder that the caller moves into place.
        source: Where tokenizer, licence files and settings of generation come from.
        plan: What was made of it.
        card: Text of README.md.
        provenance: What was made from what, kept as `provenance.json`.
        dtype: Type of the saved weights; None keeps the model's own.
    """
    state = None
    if dtype is not None:
        state = _converted(model.state_dict(), dtype)
    from transformers import GenerationConfig

    # What transformers would find wrong with the source's settings is no reason to refuse weights.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with quiet_transformers():
            model.save_pretrained(stage, state_dict=state)
    finally:
        model.generation_config = kept
    (stage / _GENERATION).unlink(missing_ok=True)
    write_generation(stage, source, plan)
    if dtype is not None:  # transformers writes the type of the model in memory
        config = read_json_object(stage / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
        write_text_atomic(stage / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_companions(stage, source, card, provenance)


def generation_settings(source: ModelFolder, plan: SurgeryPlan) -> dict[str, Any] | None:
    """Return the target's `generation_config.json`, or None where the source has none."""
    path = source.path / _GENERATION
    return remap_token_ids(read_json_object(path), plan) if path.is_file() else None


def write_generation(stage: Path, source: ModelFolder, plan: SurgeryPlan) -> None:
    """Write `generation_config.json` where the source has one: as it stands there, with the target's token ids."""
    settings = generation_settings(source, plan)
    if settings is not None:
        write_text_atomic(stage / _GENERATION, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _converted(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors in another type; what shares memory still does, which is how transformers knows what is tied."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in state.values():
        if _memory_of(tensor) not in made:
            made[_memory_of(tensor)] = tensor.detach().to(dtype)
    return {name: made[_memory_of(tensor)] for name, tensor in state.items()}


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def write_companions(
    stage: Path,
    source: ModelFolder,
    card: str,
    provenance: dict[str, Any],
    tokenizer: Path | None = None,
    others: Sequence[ModelFolder] = (),
) -> None:
    """Write what belongs beside the weights: tokenizer, licence files, README.md and `provenance.json`.

    Args:
        stage: The folder.
        source: Where licence files come from, and the tokenizer unless it has a folder of its own.
        card: Text of README.md.
        provenance: What was made from what.
        tokenizer: Folder of the tokenizer.
        others: Other donors, whose licence files are there too: under their own names where these are free.
    """
    for name in _TOKENIZER_FILES:
        path = (tokenizer or source.path) / name
        if path.is_file():
            shutil.copyfile(path, stage / name)
    for number, folder in enumerate((source, *others)):
        for path in folder.license_files():
            same = (stage / path.name).exists() and (stage / path.name).read_bytes() == path.read_bytes()
            name = f"{path.stem}-donor-{number}{path.suffix}" if (stage / path.name).exists() else path.name
            if not same:
                shutil.copyfile(path, stage / name)
    write_text_atomic(stage / "README.md", card)
    write_json(stage / "provenance.json", provenance)
