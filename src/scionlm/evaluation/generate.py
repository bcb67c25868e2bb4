"""Text that models write after the same prompts, for people to read."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from scionlm.data import DataFolder
from scionlm.evaluation.choices import max_length
from scionlm.sources.quiet import quiet_transformers

_PROMPT_TOKENS = 24
_NEW_TOKENS = 48
_TEMPERATURE, _TOP_K = 0.8, 40


def prompt_of(data: DataFolder, domain: str) -> list[int]:
    """Return the first tokens of a domain's first held-out document, behind what the data has before each."""
    stream = data.stream(domain, "held_out")
    document = next(stream.documents())
    begin = [] if data.tokenizer.bos_id is None else [data.tokenizer.bos_id]
    return begin + stream.read(document.start, min(_PROMPT_TOKENS, document.end - document.start)).tolist()


@torch.no_grad()
def write_samples(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    places: Iterable[tuple[DataFolder, str]],
    seed: int,
    shared: bool = False,
) -> list[dict[str, Any]]:
    """Return a continuation of a prompt of each domain: `[{domain, prompt, text}]`, the same for model and seed.

    Args:
        model: The model.
        tokenizer: Of its data.
        places: The domains.
        seed: Of the dice.
        shared: Its weights are shared out over ranks. Last bits may have their texts differ, and each pass needs all:
            a rank whose text has ended goes on for the others.
    """
    result: list[dict[str, Any]] = []
    longest = max_length(model.config)
    with torch.random.fork_rng(), quiet_transformers():
        for data, domain in places:
            prompt = prompt_of(data, domain)[: max(1, longest // 2)]
            torch.manual_seed(seed)
            out: Any = model.generate(  # pyright: ignore[reportCallIssue]
                torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                do_sample=True,
                temperature=_TEMPERATURE,
                top_k=_TOP_K,
                max_new_tokens=min(_NEW_TOKENS, longest - len(prompt)),
                eos_token_id=data.tokenizer.separator_id,
                pad_token_id=data.tokenizer.separator_id,
                synced_gpus=shared,
            )
            text = tokenizer.decode(out[0, len(prompt) :].tolist(), skip_special_tokens=True)
            result.append({"domain": domain, "prompt": tokenizer.decode(prompt), "text": text})
    return result
