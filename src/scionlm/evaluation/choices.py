"""How likely a model finds given continuations of given texts: what every task with choices comes down to.

A context that several continuations share is computed once, and so are inputs that differ in nothing but what is
predicted last; batches hold texts of like length, and logits are worked out only where a continuation is predicted.

Source: `loglikelihood` of lm-eval (Gao et al.), whose pairs, truncation and greedy test these are.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import PreTrainedModel

from scionlm.core.errors import BrokenModelError, DataError
from scionlm.evaluation.loss import LOGIT_BYTES
from scionlm.parallel.placing import lies_in_parts
from scionlm.parallel.ranks import ALONE, Ranks

_BATCH_TOKENS = {"cuda": 32768, "cpu": 2048}  # beyond it a batch gets no faster
_WORTH_SHARING = 8  # tokens of a context from which on computing it apart pays

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A continuation to score.

    Attributes:
        context: Token ids before it, one at least.
        continuation: Its token ids, one at least.
    """

    context: Ids
    continuation: Ids


@dataclass(frozen=True)
class Score:
    """What a model makes of a continuation.

    Attributes:
        nll: Negative log-likelihood of all its tokens, nats.
        greedy: Whether each of its tokens is the likeliest.
    """

    nll: float
    greedy: bool


def max_length(config: Any) -> int:
    """Return how many tokens a model takes, as its transformers configuration says; 2048 where it does not."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    return next((int(value) for name in names if (value := getattr(text, name, None))), 2048)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, bos_id: int | None = None) -> Request:
    """Return a context and its continuation as tokens, split where they part in the text that both make.

    Both are encoded as one text; white space at the end of the context counts to the continuation, and so does a token
    that has some of both. No special tokens are added, as in the data.

    Differs: lm-eval counts the context's own tokens off the whole; where its last one has merged with what follows,
        the model then reads a text that lacks a piece.

    Args:
        tokenizer: The tokenizer.
        context: Text with something other than white space in it.
        continuation: Text that follows directly.
        bos_id: Token that the data has before each document; None where it has none.
    """
    whole, before = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in (context + continuation, context.rstrip())
    )
    parts = next((n for n, (one, other) in enumerate(zip(whole, before, strict=False)) if one != other), len(before))
    first = [] if bos_id is None else [bos_id]
    parts = max(parts, 1 - len(first))  # something has to come before what is predicted
    return Request(tuple(first + whole[:parts]), tuple(whole[parts:]))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    requests: Sequence[Request],
    max_length: int,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> list[Score]:
    """Return the score of each request.

    Ranks take turns at the batches, and nothing depends on how many there are; all have to call.

    Args:
        model: The model; logits in its own type, their softmax in float32.
        requests: What to score.
        max_length: Tokens that the model takes; of longer texts the end counts.
        batch_size: Inputs in one pass; None takes what keeps the device busy. Where memory does not do, fewer.
        on_progress: Told the number of requests done.
        ranks: The processes that share the work.

    Raises:
        DataError: A continuation is empty, or longer than the model takes.
        BrokenModelError: A score is not finite.
    """
    longest: dict[Ids, int] = {}  # of each input, how many of its last positions predict something
    owners: dict[Ids, list[int]] = {}
    families: dict[Ids, list[Ids]] = {}  # inputs by the context that they share
    for index, request in enumerate(requests):
        size = len(request.continuation)
        if not 0 < size <= max_length or not request.context:
            raise DataError(f"request {index} has {size} tokens to score, and the model takes 1 to {max_length:,}")
        whole = request.context + request.continuation
        ids = whole[-max_length - 1 : -1]
        if ids not in owners:
            families.setdefault(request.context if len(whole) <= max_length + 1 else ids, []).append(ids)
        owners.setdefault(ids, []).append(index)
        longest[ids] = max(longest.get(ids, 0), size)
    shared = [some for some in families.values() if len(some) > 1 and _common(some, longest) >= _WORTH_SHARING]
    taken = {ids for some in shared for ids in some}
    single = [[ids] for ids in owners if ids not in taken]
    found: list[Score] = [Score(0.0, False)] * len(requests)
    done = 0
    tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
    limits = _Limits(tokens, batch_size, int(model.config.get_text_config().vocab_size))
    for groups, is_shared in ((shared, True), (single, False)):
        batches = _batches(groups, longest, limits, is_shared)
        for first in range(0, len(batches), ranks.world):
            turn = batches[first : first + ranks.world]
            # Where there are more ranks than batches left, all compute all the same: weights may be shared out.
            mine = turn[min(ranks.rank, len(turn) - 1)]
            rows = [[(ids, [(n, requests[n].continuation) for n in owners[ids]]) for ids in group] for group in mine]
            for scores in ranks.gather(_forward(model, rows, is_shared))[: len(turn)]:
                for index, nll, greedy in scores:
                    found[index] = Score(nll, greedy)
                    done += 1
            on_progress(done)
    if broken := next((one for one in found if not math.isfinite(one.nll)), None):
        raise BrokenModelError(f"a log-likelihood is {-broken.nll}: the model's weights are broken")
    return found


def _common(group: list[Ids], longest: dict[Ids, int]) -> int:
    """Return how many of their first tokens all have in common, as far as nothing is predicted there."""
    return min(len(ids) - longest[ids] for ids in group)


@dataclass(frozen=True)
class _Limits:
    """What one pass may hold: tokens, or rows where they are set, and bytes of logits."""

    tokens: int
    rows: int | None
    vocab_size: int


def _batches(
    groups: list[list[Ids]], longest: dict[Ids, int], limits: _Limits, is_shared: bool
) -> list[list[list[Ids]]]:
    """Return groups in batches, those with the longest texts first: what memory cannot hold shows at once."""
    batches: list[list[list[Ids]]] = []
    length = rows = prefix = 0
    if limits.rows:
        groups = [group[k : k + limits.rows] for group in groups for k in range(0, len(group), limits.rows)]
    for group in sorted(groups, key=lambda some: (-max(map(len, some)), -_common(some, longest), some)):
        most, least = max(map(len, group)), _common(group, longest)
        if batches:
            count, start = rows + len(group), min(prefix, least)
            own = length - start if is_shared else length  # of each row; what is before it is computed once a group
            size = (count * own + (len(batches[-1]) + 1) * start) if is_shared else count * length
            fits = count <= limits.rows if limits.rows else size <= limits.tokens
            if fits and 4 * count * (length - start) * limits.vocab_size <= LOGIT_BYTES:
                batches[-1].append(group)
                rows, prefix = count, start
                continue
        batches.append([group])
        length, rows, prefix = most, len(group), least
    return batches


_Row = tuple[Ids, list[tuple[int, Ids]]]  # an input, and the continuations that end with it
_Scored = list[tuple[int, float, bool]]  # request, nll, greedy


def _forward(model: PreTrainedModel, groups: list[list[_Row]], is_shared: bool) -> _Scored:
    """Return the scores of a batch, in two halves where memory does not do; the rows of one group are halved too."""
    try:
        return _pass(model, groups, is_shared)
    except torch.OutOfMemoryError:
        if len(groups) == 1 and len(groups[0]) == 1:
            raise
        if lies_in_parts(model):  # the others would not make two passes of this one
            raise
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    if len(groups) == 1:
        middle = len(groups[0]) // 2
        groups = [groups[0][:middle], groups[0][middle:]]
    middle = len(groups) // 2
    return _forward(model, groups[:middle], is_shared) + _forward(model, groups[middle:], is_shared)


def _pass(model: PreTrainedModel, groups: list[list[_Row]], is_shared: bool) -> _Scored:
    places: list[tuple[int, int]] = []  # (row, position) of each prediction
    labels: list[int] = []
    owners: list[int] = []  # which continuation each belongs to
    names: list[int] = []
    rows = [row for group in groups for row in group]
    for row, (ids, continuations) in enumerate(rows):
        for index, continuation in continuations:
            start = len(ids) - len(continuation)
            places += [(row, start + offset) for offset in range(len(continuation))]
            labels += continuation
            owners += [len(names)] * len(continuation)
            names.append(index)
    first = min(position for _, position in places)
    logits = _logits(model, [[ids for ids, _ in group] for group in groups], first, is_shared)
    at = torch.tensor(places, device=logits.device)
    wanted = torch.tensor(labels, device=logits.device)
    picked = logits[at[:, 0], at[:, 1] - first].float()
    nll = functional.cross_entropy(picked, wanted, reduction="none").double().cpu()
    missed = (picked.argmax(-1) != wanted).cpu()
    owner = torch.tensor(owners)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, owner, nll)
    misses = torch.zeros(len(names), dtype=torch.int64).index_add_(0, owner, missed.long())
    return [(n, s, m == 0) for n, s, m in zip(names, sums.tolist(), misses.tolist(), strict=True)]


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Return what makes a model work out the logits of its last positions only; nothing where it cannot."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _logits(model: PreTrainedModel, groups: list[list[Ids]], first: int, is_shared: bool) -> torch.Tensor:
    """Return the logits of each input from position `first` on, `[rows, longest - first, vocabulary]`.

    Attention is causal, so that what pads a row on the right changes nothing before it. Where they are shared, the
    first `first` tokens of each group go through the model once, and the keys and values they leave serve all its rows.
    """
    options: dict[str, Any] = {"use_cache": is_shared}
    rows = [ids for group in groups for ids in group]
    begin = first if is_shared else 0
    batch = torch.zeros(len(rows), max(map(len, rows)) - begin, dtype=torch.long)
    for row, ids in enumerate(rows):
        batch[row, : len(ids) - begin] = torch.tensor(ids[begin:])
    if is_shared:
        heads = torch.tensor([group[0][:first] for group in groups], device=model.device)
        cache = model(input_ids=heads, use_cache=True, **last_logits(model, 1)).past_key_values
        owner = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=model.device)
        cache.batch_select_indices(owner)
        options["past_key_values"] = cache
    else:
        options |= last_logits(model, batch.shape[1] - first)
    logits = model(input_ids=batch.to(model.device), **options).logits
    return logits if is_shared else logits[:, first - batch.shape[1] :]
