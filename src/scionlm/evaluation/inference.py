"""What running a model costs: its size, how fast it reads and writes, what it keeps of each token."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.records import Record
from scionlm.evaluation.choices import last_logits, max_length

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 5


def kv_cache_bytes(config: Any, bytes_each: int) -> Record:
    """Return what the keys and values of one more token take, from a transformers configuration.

    Two tensors (keys, values) of kv_heads x head_dim in each layer. A layer with a sliding window keeps no more than
    its window, so that the figure holds up to there: `window_layers` of the layers are such, `window` tokens wide.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    sliding = 0
    if window:
        sliding = layers if kinds is None else sum(kind == "sliding_attention" for kind in kinds)
    return {
        "kv_cache_bytes_per_token": 2 * layers * kv_heads * head_dim * bytes_each,
        "window_layers": sliding,
        "window": window if sliding else None,
    }


@torch.no_grad()
def inference_speed(
    model: PreTrainedModel,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    device_name: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Record:
    """Return sizes of a model and medians of what it does in a second, one sequence at a time, greedily.

    Prefill is one pass over the prompt with logits of its last token alone; its time is that to the first token. Decode
    is one token after another with the cache. A first round that is not counted warms up.

    Args:
        model: The model, in the type it is to run in.
        prompt_tokens: Length of the prompt; ids are drawn with a fixed seed. Both lengths are less where the model
            takes no more.
        new_tokens: Tokens written after the first.
        repeats: Rounds; the median counts.
        device_name: What the device is called; None is its kind.
        clock: Seconds.
    """
    device = model.device
    longest = max_length(model.config)
    new_tokens = min(new_tokens, longest // 2)
    prompt_tokens = min(prompt_tokens, longest - new_tokens)
    vocab_size = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)

    def now() -> float:
        if device.type == "cuda":
            torch.accelerator.synchronize(device)
        return clock()

    firsts, steps = [], []
    for _ in range(repeats + 1):
        begin = now()
        found = model(input_ids=prompt, use_cache=True, **last_logits(model, 1))
        token = found.logits[:, -1:].argmax(-1)
        middle = now()
        for _ in range(new_tokens):
            found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)
        firsts.append(middle - begin)
        steps.append(now() - middle)
    first, rest = statistics.median(firsts[1:]), statistics.median(steps[1:])
    weights = {id(each): each for each in model.parameters()}  # tied ones once
    bytes_each = next(iter(weights.values())).element_size()
    return {
        "num_parameters": sum(each.numel() for each in weights.values()),
        "weight_bytes": sum(each.numel() * each.element_size() for each in weights.values()),
        "prefill_tokens_per_second": prompt_tokens / first,
        "decode_tokens_per_second": new_tokens / rest,
        "time_to_first_token_seconds": first,
        **kv_cache_bytes(model.config, bytes_each),
        "settings": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch_size": 1,
            "repeats": repeats,
            "statistic": "median",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name or device.type,
            "threads": torch.get_num_threads(),
        },
    }
