"""How far random weights spread, where a model was not begun as transformers begins its family. Without torch."""

import math
from typing import Literal

from scionlm.families.shape import ModelShape

Init = Literal["transformers", "tinyllama", "gpt_neox"]
"""`transformers`: the family's own way; the others: normal weights of a spread that width and depth decide, gains of
one, biases of zero."""

OUTPUTS = ("attention_output", "mlp_output")
"""Roles of the projections that add to the residual stream, which begin the smaller the more layers there are."""


def standard_deviations(init: Init, shape: ModelShape) -> tuple[float, float]:
    """Return the standard deviation of embeddings and matrices, and that of the projections in `OUTPUTS`.

    The first is "small init", sqrt(2 / (5 hidden_size)). The second is 2 / (layers sqrt(hidden_size)) in GPT-NeoX
    ("Wang init", which Pythia was trained with) and half of that in TinyLlama.

    Source: Nguyen and Salazar 2019, arXiv:1910.05895; Black et al. 2022 (GPT-NeoX-20B), arXiv:2204.06745, section 2.1;
    TinyLlama's `GPT._init_weights`.

    Raises:
        ValueError: It is transformers' own, which is no two numbers.
    """
    factors = {"tinyllama": 1.0, "gpt_neox": 2.0}
    if init not in factors:
        raise ValueError(f"init {init} has no spread of its own")
    width = math.sqrt(shape.hidden_size)
    return math.sqrt(0.4) / width, factors[init] / (shape.num_hidden_layers * width)
