"""From a model's configuration to its family."""

from typing import Any

from scionlm.core.errors import DataError
from scionlm.families import gemma, gpt, llama
from scionlm.families.spec import FamilySpec

FAMILIES: tuple[FamilySpec, ...] = tuple(
    value for page in (llama, gemma, gpt) for value in vars(page).values() if isinstance(value, FamilySpec)
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: dict[str, Any]) -> FamilySpec:
    """Return the family of a model from its `config.json`.

    Raises:
        DataError: No family covers the model's type, or the model uses a setting that its family page leaves out.
    """
    model_type = config.get("model_type")
    if model_type not in _BY_TYPE:
        inner = config.get("text_config")
        if isinstance(inner, dict):
            raise DataError(
                f"model_type {model_type!r} holds a language model inside (text_config: {inner.get('model_type')!r}); "
                "save the text model on its own first"
            )
        raise DataError(
            f"model_type {model_type!r} is not a family that Scion knows ({', '.join(sorted(_BY_TYPE))}); "
            "a family is a few lines of data: CONTRIBUTING.md says how to add one"
        )
    family = _BY_TYPE[model_type]
    for key, wanted in family.required_config.items():
        value = family.get(config, wanted) if isinstance(wanted, str) else wanted
        if config.get(key, value) != value:
            raise DataError(f"config.json: {model_type} with {key} = {config[key]!r} is not supported, only {value!r}")
    return family
