"""From a model's configuration to its family."""

from typing import Any

from scionlm.core.errors import DataError
from scionlm.families.llama import LLAMA, MISTRAL
from scionlm.families.spec import FamilySpec

FAMILIES = (LLAMA, MISTRAL)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: dict[str, Any]) -> FamilySpec:
    """Return the family of a model from its `config.json`.

    Raises:
        DataError: No family covers the model's type.
    """
    model_type = config.get("model_type")
    if model_type not in _BY_TYPE:
        raise DataError(
            f"model_type {model_type!r} is not a family that Scion knows ({', '.join(sorted(_BY_TYPE))}); "
            "a family is a page of data, see scionlm/families/llama.py"
        )
    return _BY_TYPE[model_type]
