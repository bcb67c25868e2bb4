"""Held-out loss per domain: the mean negative log-likelihood, in nats, of the packed held-out stream.

The stream is read in fixed windows of `seq_len` + 1 tokens that overlap by one, so that each token but the first is
predicted once; the last window is as long as what is left. Separators count. A budget takes the start of the stream.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import PreTrainedModel

from scionlm.core.errors import BrokenModelError, DataError
from scionlm.data import DataFolder, TokenStream
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.sources import load_tokenizer

LOGIT_BYTES = 2**28  # how much the logits of one forward pass may take


class TokenNll(Protocol):
    """Gives each label's negative log-likelihood: `(input_ids, labels) -> nll`, all `[sequences, length]`, float32."""

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the losses."""
        ...


@dataclass(frozen=True)
class DomainLoss:
    """The loss on one domain.

    Attributes:
        nll_sum: Summed negative log-likelihood, nats.
        num_tokens: Predicted tokens.
        num_bytes: UTF-8 bytes of the documents they belong to.
        windows: The sum of each window, in the stream's order, where it was read in windows.
        seq_len: Predicted tokens in each window but the last, which has what is left; 0 where there are none.
    """

    nll_sum: float
    num_tokens: int
    num_bytes: int
    windows: tuple[float, ...] = ()
    seq_len: int = 0

    @property
    def nll(self) -> float:
        """Mean over the predicted tokens, nats."""
        return self.nll_sum / self.num_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that reports show."""
        return {
            "nll": self.nll,
            "perplexity": math.exp(min(self.nll, 700.0)),
            "bits_per_byte": self.nll_sum / math.log(2) / self.num_bytes,
            "num_tokens": self.num_tokens,
        }


def model_token_nll(model: PreTrainedModel) -> TokenNll:
    """Return the plain loss of a transformers model, computed in its own type, the softmax in float32."""

    def token_nll(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        flat = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.to(model.device).flatten(), reduction="none"
        )
        return flat.view_as(labels)

    return token_nll


def held_out_span(stream: TokenStream, max_tokens: int | None, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return (tokens, UTF-8 bytes) of the start of a stream in which at most `max_tokens` are predicted.

    A document that the budget cuts short counts the bytes of its decoded tokens.
    """
    limit = stream.num_tokens if max_tokens is None else min(stream.num_tokens, max_tokens + 1)
    num_bytes = 0
    for document in stream.documents():
        if document.end <= limit:
            num_bytes += document.num_bytes
        elif document.start < limit:
            text = tokenizer.decode(stream.read(document.start, limit - document.start).tolist())
            num_bytes += len(text.encode("utf-8", "replace"))
        else:
            break
    return limit, num_bytes


@torch.no_grad()
def stream_loss(
    token_nll: TokenNll, stream: TokenStream, seq_len: int, vocab_size: int, num_tokens: int, ranks: Ranks = ALONE
) -> Iterator[tuple[int, list[float]]]:
    """Yield (predictions made, summed nll of each further window) while going through the start of a stream.

    Ranks take turns and their windows come in the stream's order, so that nothing depends on how many there are.
    """
    pieces = list(_pieces(seq_len, max(1, LOGIT_BYTES // (4 * seq_len * vocab_size)), num_tokens))
    for first in range(0, len(pieces), ranks.world):
        turn = pieces[first : first + ranks.world]
        # Where there are more ranks than pieces left, all compute all the same: weights may be shared out.
        position, count, length = turn[min(ranks.rank, len(turn) - 1)]
        ids = torch.from_numpy(stream.read(position, count * length + 1))
        nll = token_nll(ids[:-1].view(count, length), ids[1:].view(count, length))
        sums = ranks.gather(nll.double().sum(1).tolist())
        position, count, length = turn[-1]
        yield position + count * length, [value for piece in sums[: len(turn)] for value in piece]


def _pieces(seq_len: int, rows: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (position, windows, tokens that are predicted in each) of what goes through a model at once."""
    position = 0
    while position < num_tokens - 1:
        full = min(rows, (num_tokens - 1 - position) // seq_len)
        length = seq_len if full else num_tokens - 1 - position
        count = max(full, 1)
        yield position, count, length
        position += count * length


def domain_losses(
    token_nll: TokenNll,
    data: DataFolder,
    domains: list[str],
    seq_len: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
    ranks: Ranks = ALONE,
) -> dict[str, DomainLoss]:
    """Return the held-out loss of each domain.

    Args:
        token_nll: The model as a loss.
        data: The prepared data.
        domains: Which of its domains.
        seq_len: Tokens that are predicted in one window.
        max_tokens: Budget a domain; None takes the whole held-out split.
        on_progress: Told the number of tokens done, over all domains.
        ranks: The processes that share the work.

    Raises:
        DataError: A domain has no held-out text, or a loss is not finite.
    """
    result: dict[str, DomainLoss] = {}
    tokenizer = load_tokenizer(data.tokenizer_folder)
    before = 0
    for domain in domains:
        stream = data.stream(domain, "held_out")
        span = held_out_span(stream, max_tokens, tokenizer)
        if span[0] < 2:
            raise DataError(f"domain {domain!r} of {data.path} has no held-out text to predict")
        windows: list[float] = []
        vocab_size = data.tokenizer.vocab_size
        for done, sums in stream_loss(token_nll, stream, seq_len, vocab_size, span[0], ranks):
            windows += sums
            on_progress(before + done)
        loss = DomainLoss(math.fsum(windows), span[0] - 1, span[1], tuple(windows), seq_len)
        if not math.isfinite(loss.nll_sum):
            raise BrokenModelError(f"the loss on domain {domain!r} is {loss.nll_sum}: the model's weights are broken")
        result[domain] = loss
        before += loss.num_tokens
    return result
