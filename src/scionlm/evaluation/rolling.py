"""Loss per document, the rolling form of the LM Evaluation Harness.

Each document stands alone after the tokenizer's BOS (or EOS); its tokens are predicted once each, in windows of the
full length: every window but the first sees as much of the document before it as fits. Separators are not predicted.

Source: `loglikelihood_rolling` of lm-eval (Gao et al.), with `get_rolling_token_windows` and a context of one token.
"""

import math
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.data import DataFolder
from scionlm.evaluation.choices import Request, score
from scionlm.evaluation.loss import DomainLoss
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.sources import load_tokenizer

_AT_ONCE = 256  # windows; more wait, so that those of like length can share a pass


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


def rolling_losses(
    model: PreTrainedModel,
    data: DataFolder,
    domains: list[str],
    seq_len: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
    ranks: Ranks = ALONE,
) -> dict[str, DomainLoss]:
    """Return the rolling loss of each domain's held-out documents; other arguments as for `domain_losses`.

    Args:
        model: The model.
        data: The data folder.
        domains: Which domains.
        seq_len: Tokens predicted in one window at most.
        max_tokens: Budget a domain; None takes all.
        on_progress: Told the tokens predicted so far.
        ranks: The processes that share the work; all have to call.

    Raises:
        DataError: A domain has no held-out text.
        BrokenModelError: A loss is not finite.
    """
    result: dict[str, DomainLoss] = {}
    tokenizer = load_tokenizer(data.tokenizer_folder)
    done = 0
    for domain in domains:
        nlls: list[float] = []
        num_tokens, num_bytes = 0, 0
        windows: list[Request] = []
        for tokens, size in _documents(data, domain, max_tokens, tokenizer):
            for window, count in rolling_windows(tokens, data.tokenizer.prefix_id, seq_len):
                windows.append(Request(tuple(window[:-count]), tuple(window[-count:])))
            num_tokens += len(tokens)
            num_bytes += size
            if len(windows) >= _AT_ONCE:
                nlls += [one.nll for one in score(model, windows, seq_len, ranks=ranks)]
                windows.clear()
                on_progress(done + num_tokens)
        if num_tokens == 0:
            raise DataError(f"domain {domain!r} of {data.path} has no held-out text to predict")
        nlls += [one.nll for one in score(model, windows, seq_len, ranks=ranks)]
        result[domain] = DomainLoss(math.fsum(nlls), num_tokens, num_bytes)
        done += num_tokens
        on_progress(done)
    return result


def _documents(
    data: DataFolder, domain: str, max_tokens: int | None, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], int]]:
    """Yield tokens and UTF-8 bytes of held-out documents, the last one as far as the budget goes."""
    stream = data.stream(domain, "held_out")
    left = stream.num_tokens if max_tokens is None else max_tokens
    for document in stream.documents():
        length = min(document.end - document.start, left)
        if length:
            tokens = stream.read(document.start, length).tolist()
            whole = document.start + length == document.end
            cut = 0 if whole else len(tokenizer.decode(tokens).encode("utf-8", "replace"))
            yield tokens, document.num_bytes if whole else cut
        left -= length
        if not left:
            return
