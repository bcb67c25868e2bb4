"""What a model from scratch takes by budgets that others chose, and how fast models of its shape were trained."""

from dataclasses import dataclass

from scionlm.core.config import Mapping
from scionlm.core.devices import GPUS
from scionlm.core.records import Record
from scionlm.families import count_parameters, flops_per_token
from scionlm.recipes.config import Recipe
from scionlm.recipes.model_shapes import SHAPE, model_config

FORMULA = "6 N + 12 layers * hidden_size * seq_len operations a token, N without the input embedding"
"""What `families.flops_per_token` counts, norms aside; attention is not halved for being causal."""
_COMPUTE_OPTIMAL = 20.0
"""Tokens a parameter at which operations are spent best. Source: Hoffmann et al. 2022, arXiv:2203.15556, table 3."""
_OVER_TRAINED = 3.0e12 / 1.1e9
"""Tokens a parameter of TinyLlama, which is to be used more than it was trained. Source: arXiv:2401.02385."""


@dataclass(frozen=True)
class Published:
    """How fast somebody trained a model.

    Attributes:
        what: As they say it.
        tokens_per_s: Tokens a second, of one device.
        device: Its name in the table of devices.
        seq_len: Tokens in a sequence.
        mfu: Share of the device's peak that they state; None where they state none.
        source: Where it stands.
    """

    what: str
    tokens_per_s: float
    device: str
    seq_len: int
    mfu: float | None
    source: str


_PUBLISHED = {
    "tinyllama-1.1b": Published(
        "24k tokens/s on an A100 of 40 GB", 24_000, "A100", 2048, 0.56, "arXiv:2401.02385 and README of its code"
    ),
    "pythia-1b": Published(
        "4,830 A100-hours for 300B tokens", 299_892_736_000 / (4830 * 3600), "A100", 2048, None,
        "README of TinyLlama's code",
    ),
    "gpt2": Published(
        "295B tokens in about four days on eight A100 of 40 GB", 600_000 * 491_520 / (4 * 86_400 * 8), "A100", 1024,
        None, "README and config/train_gpt2.py of karpathy/nanoGPT",
    ),
}  # fmt: skip


def with_budgets(recipe: Recipe, planned: Record) -> Record:
    """Return the plan of a model from scratch with its known `model`, `budgets` and `published` speed; others as it is.

    Budgets are `compute-optimal`, `over-trained` and `this recipe`: tokens, tokens a parameter, operations and seconds
    of training on the planned devices, evaluations left out, and why so many tokens.

    Args:
        recipe: The recipe.
        planned: Its plan.
    """
    if recipe.recipe != "scratch":
        return planned
    parameters, tokens = planned["num_parameters"], planned["num_tokens"]
    sizes = [
        ("compute-optimal", round(_COMPUTE_OPTIMAL * parameters), "Hoffmann et al. 2022, arXiv:2203.15556"),
        ("over-trained", round(_OVER_TRAINED * parameters), "as TinyLlama, arXiv:2401.02385"),
        ("this recipe", tokens, "train, or its stages"),
    ]
    flops = planned["flops"] / tokens
    seconds = sum(planned["seconds_by_part"].get(part, 0.0) for part in ("training", "teacher")) / tokens
    budgets = [
        {
            "name": name,
            "tokens": size,
            "tokens_per_parameter": size / parameters,
            "flops": flops * size,
            "seconds": seconds * size,
            "why": why,
        }
        for name, size, why in sizes
    ]
    model = recipe.model or {}
    return planned | {"model": model.get(SHAPE), "budgets": budgets, "published": _published(model)}


def _published(model: Mapping) -> Record | None:
    """Return how fast a known model was trained, beside what the table expects; None where that is not known.

    Of a model with other sizes nothing is known; of one with another vocabulary it is that of the published one.
    """
    known = _PUBLISHED.get(model.get(SHAPE, ""))
    if known is None:
        return None
    whole = model_config({SHAPE: model[SHAPE]})
    mine = model_config(model) | {"vocab_size": whole["vocab_size"]}
    if count_parameters(mine) != count_parameters(whole):
        return None
    device = GPUS[known.device.lower()]
    peak, flops = device.peak("bf16"), flops_per_token(whole, known.seq_len)
    return {
        "what": known.what,
        "source": known.source,
        "tokens_per_s": known.tokens_per_s,
        "device": known.device,
        "mfu": known.mfu,
        "formula": FORMULA,
        "flops_per_token": flops,
        "utilization": known.tokens_per_s * flops / peak,
        "table_utilization": device.utilization,
        "table_tokens_per_s": device.utilization * peak / flops,
    }
