"""The offline suite: task scores from one's own held-out text, without network or lm-eval."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from scionlm.core.records import stderr_key
from scionlm.evaluation.choices import Score, encode_pair, score
from scionlm.evaluation.passages import Item, Passages, items_hash, require_items
from scionlm.evaluation.task_record import TaskResults, item_record
from scionlm.parallel.ranks import ALONE, Ranks

VERSION = 3
"""Of how items are made and scored; scores of different versions are not comparable."""
NUM_ITEMS = 100
"""Items of each task."""

Scores = list[tuple[Item, list[Score]]]


def offline_scores(
    model: PreTrainedModel,
    passages: Passages,
    tokenizer: Tokenizer,
    bos_id: int | None,
    max_length: int,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> TaskResults:
    """Return the accuracy of a model on the offline suite, each task as a whole and by domain.

    `acc` is the share of items whose true choice has the highest likelihood; where there is one choice, whose tokens
    all are the likeliest. `acc_norm` divides by the length of the choice, in characters. `nll` is that of the true
    choice, nats. `chance` is what guessing comes to.

    Args:
        model: The model.
        passages: The items.
        tokenizer: Of the data they are from.
        bos_id: Token before each of its documents; None where there is none.
        max_length: Tokens the model takes.
        batch_size: Inputs in one pass; None finds one.
        on_progress: Told the number of choices scored.
        ranks: The processes that share the work.

    Raises:
        DataError: There are no items.
    """
    require_items(passages)
    places = [
        (task, item, choice) for task, items in passages.tasks.items() for item in items for choice in item.choices
    ]
    requests = [encode_pair(tokenizer, item.context, choice, bos_id) for _, item, choice in places]
    found = iter(score(model, requests, max_length, batch_size, on_progress, ranks))
    results = TaskResults()
    for task, items in passages.tasks.items():
        scored = [(item, [next(found) for _ in item.choices]) for item in items]
        digest = items_hash(items)
        names = dict.fromkeys(item.domain for item in items)
        by_domain = {name: _figures([one for one in scored if one[0].domain == name]) for name in names}
        results.tasks[task] = _figures(scored) | {
            "chance": 0.0 if len(items[0].choices) == 1 else 1 / len(items[0].choices),
            "metric": "acc",
            "num_fewshot": 0,
            "version": VERSION,
            "config_sha256": hashlib.sha256(json.dumps([task, VERSION, passages.seed, digest]).encode()).hexdigest(),
            "domains": by_domain,
        }
        results.items[task] = item_record("acc", [int(_is_right(*one)) for one in scored], digest)
    return results


def _is_right(item: Item, scores: Sequence[Score], normed: bool = False) -> bool:
    if len(scores) == 1:
        return scores[0].greedy
    values = [one.nll / (len(text) if normed else 1) for one, text in zip(scores, item.choices, strict=True)]
    return values.index(min(values)) == item.answer


def _figures(scored: Scores) -> dict[str, Any]:
    figures = mean_and_error("acc", [float(_is_right(*one)) for one in scored])
    if len(scored[0][1]) > 1:
        figures |= mean_and_error("acc_norm", [float(_is_right(*one, normed=True)) for one in scored])
    figures |= mean_and_error("nll", [scores[item.answer].nll for item, scores in scored])
    return figures | {"num_items": len(scored)}


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return a mean and its standard error, under lm-eval's names; the error of one value is None."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {name: mean, stderr_key(name): None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return {name: mean, stderr_key(name): math.sqrt(variance / count)}
