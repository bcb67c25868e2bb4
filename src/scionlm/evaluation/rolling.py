"""Loss per document, the rolling form of the LM Evaluation Harness.

Each document stands alone after the tokenizer's BOS (or EOS); its tokens are predicted once each, in windows of the
full length: every window but the first sees as much of the document before it as fits. Separators are not predicted.

Source: `loglikelihood_rolling` of lm-eval (Gao et al.), with `get_rolling_token_windows` and a context of one token.
"""

import math
from collections.abc import Callable, Iterator

import torch

from scionlm.core.errors import DataError
from scionlm.data import DataFolder
from scionlm.data.mixing.windows import IGNORE
from scionlm.evaluation.loss import DomainLoss, TokenNll
from scionlm.sources import load_tokenizer


def rolling_windows(tokens: list[int], prefix: int, seq_len: int) -> Iterator[tuple[list[int], int]]:
    """Yield (input with its last label appended, how many of its last tokens are predicted) for one document.

    Example:
        >>> list(rolling_windows([1, 2, 3, 4, 5], prefix=0, seq_len=4))
        [([0, 1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 1)]
    """
    padded = [prefix, *tokens]
    first = min(seq_len, len(tokens))
    yield padded[: first + 1], first
    done = first
    while done < len(tokens):
        count = min(seq_len, len(tokens) - done)
        end = done + count
        yield padded[end - seq_len : end + 1], count
        done = end


@torch.no_grad()
def rolling_losses(
    token_nll: TokenNll,
    data: DataFolder,
    domains: list[str],
    seq_len: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, DomainLoss]:
    """Return the rolling loss of each domain's held-out documents; arguments as for `domain_losses`.

    Raises:
        DataError: A domain has no held-out text.
    """
    result: dict[str, DomainLoss] = {}
    tokenizer = load_tokenizer(data.tokenizer_folder)
    done = 0
    for domain in domains:
        stream = data.stream(domain, "held_out")
        left = stream.num_tokens if max_tokens is None else max_tokens
        total, num_tokens, num_bytes = 0.0, 0, 0
        for document in stream.documents():
            if num_tokens >= left:
                break
            length = min(document.end - document.start, left - num_tokens)
            if length == 0:
                continue
            tokens = stream.read(document.start, length).tolist()
            whole = document.start + length == document.end
            for window, count in rolling_windows(tokens, data.tokenizer.prefix_id, seq_len):
                ids = torch.tensor([window])
                labels = ids[:, 1:].clone()
                labels[:, : labels.shape[1] - count] = IGNORE
                total += float(token_nll(ids[:, :-1], labels).double().sum())
            num_tokens += len(tokens)
            text_bytes = len(tokenizer.decode(tokens).encode("utf-8", "replace"))
            num_bytes += document.num_bytes if whole else text_bytes
            on_progress(done + num_tokens)
        if num_tokens == 0:
            raise DataError(f"domain {domain!r} of {data.path} has no held-out text to predict")
        if not math.isfinite(total):
            raise DataError(f"the loss on domain {domain!r} is {total}: the model's weights are broken")
        result[domain] = DomainLoss(total, num_tokens, num_bytes)
        done += num_tokens
    return result
