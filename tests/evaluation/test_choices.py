"""Scores of continuations: against lm-eval's own, against a computation by hand, and for every family."""

import math
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from factories import MODEL_IDS, MODELS, VOCAB_SIZE, text, tiny_model
from scionlm.core.errors import BrokenModelError, DataError
from scionlm.evaluation.choices import Request, encode_pair, score
from scionlm.sources import load_tokenizer


def requests_of(seed=0, contexts=6, choices=4):
    """Contexts of many lengths, each with choices of many lengths; some of one token, some single."""
    rng = random.Random(seed)

    def some(low, high):
        return tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(low, high)))

    found = []
    for number in range(contexts):
        context = some(1, 40)
        found += [Request(context, some(1, 1 if number == 2 else 9)) for _ in range(choices)]
    return [*found, Request(some(3, 3), some(2, 2)), Request((7,), (9,))]


@torch.no_grad()
def by_hand(model, request, max_length=10**9):
    ids = (request.context + request.continuation)[-max_length - 1 :]
    log_p = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), -1)
    n = len(request.continuation)
    rows = log_p[-n:]
    wanted = torch.tensor(request.continuation)
    return -float(rows[torch.arange(n), wanted].sum()), bool((rows.argmax(-1) == wanted).all())


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_every_family_scores_as_one_request_at_a_time(model_type, changes):
    model, requests = tiny_model(model_type, **changes), requests_of()
    for request, found in zip(requests, score(model, requests, 128), strict=True):
        nll, greedy = by_hand(model, request)
        assert found.nll == pytest.approx(nll, abs=1e-4)
        assert found.greedy == greedy


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("max_length", [12, 128])
def test_batches_and_truncation_change_nothing(batch_size, max_length):
    model, requests = tiny_model(), requests_of(1)
    found = score(model, requests, max_length, batch_size)
    for request, one in zip(requests, found, strict=True):
        assert one.nll == pytest.approx(by_hand(model, request, max_length)[0], abs=1e-4)
    if max_length == 12:  # negative control: what was cut off matters
        assert any(abs(one.nll - by_hand(model, r)[0]) > 1e-2 for one, r in zip(found, requests, strict=True))


def test_scores_agree_with_lm_evals_to_a_ten_thousandth(tiny_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = tiny_model()
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_folder), batch_size=3, max_length=128)
    pairs = []
    for number in range(8):
        words = text(number, 30).split(" ")
        for other in range(3):
            ending = text(100 * number + other, 1 + other)
            pairs.append(
                (" ".join(words[: 5 + 3 * number]) + " " * (number == 3), ending if number == 3 else " " + ending)
            )
    arguments = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = theirs.loglikelihood(arguments, disable_tqdm=True)
    tokenizer = load_tokenizer(tiny_folder)
    found = score(model, [encode_pair(tokenizer, *pair) for pair in pairs], 128)
    for one, (log_p, greedy) in zip(found, expected, strict=True):
        assert -one.nll == pytest.approx(log_p, abs=1e-4)
        assert one.greedy == greedy
    # Negative control: another model is told apart.
    other = score(tiny_model(seed=1), [encode_pair(tokenizer, *pair) for pair in pairs], 128)
    assert max(abs(a.nll - b.nll) for a, b in zip(found, other, strict=True)) > 1e-2


def test_a_shared_context_goes_through_the_model_once():
    model, seen = tiny_model(), []
    context = tuple(range(1, 31))
    requests = [Request(context, (5, n)) for n in (1, 2)] + [Request(context, (6, n)) for n in (1, 2)]
    expected = [by_hand(model, request)[0] for request in requests]
    model.register_forward_pre_hook(lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    found = score(model, requests, 128)
    assert seen == [(1, 29), (2, 2)]  # (5, 1) and (5, 2) are one input
    assert [one.nll for one in found] == pytest.approx(expected, abs=1e-4)


def test_greedy_is_told():
    model = tiny_model()
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax())
    found = score(model, [Request((3, 4, 5), (likeliest,)), Request((3, 4, 5), ((likeliest + 1) % VOCAB_SIZE,))], 64)
    assert [one.greedy for one in found] == [True, False]


def test_memory_that_does_not_do_halves_the_batch(monkeypatch):
    import scionlm.evaluation.choices as module

    model, requests, real, sizes = tiny_model(), requests_of(2), module._pass, []

    def scarce(model, groups, is_shared):
        if len(groups) > 2:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(groups))
        return real(model, groups, is_shared)

    expected = score(model, requests, 128)
    monkeypatch.setattr(module, "_pass", scarce)
    found = score(model, requests, 128)
    assert max(sizes) == 2
    assert [one.nll for one in found] == pytest.approx([one.nll for one in expected], abs=1e-4)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="0 tokens"):
        score(tiny_model(), [Request((1,), ())], 64)
    with pytest.raises(DataError, match="65 tokens"):
        score(tiny_model(), [Request((1,), (2,) * 65)], 64)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(BrokenModelError):
        score(broken, [Request((1,), (2,))], 64)


def test_ranks_take_turns_and_agree():
    """Two ranks, one after the other: each computes its own batches, together they have all."""
    from scionlm.parallel.ranks import Ranks

    model, requests = tiny_model(), requests_of(3)
    expected = score(model, requests, 128, batch_size=4)
    computed = []

    class Listening(Ranks):
        world = 2

        def gather(self, value):
            computed.append(value)
            return [value, value]

    for rank in (0, 1):
        ranks = Listening()
        ranks.rank = rank
        score(model, requests, 128, batch_size=4, ranks=ranks)
    merged = {index: nll for part in computed for index, nll, _ in part}
    assert [merged[n] for n in range(len(requests))] == pytest.approx([one.nll for one in expected])


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("for x in values:", "\n        total += x"), ("It ends.", "\n\nIt begins"), ("one two", " three"), ("a ", "b")],
)
def test_what_merges_with_the_context_is_not_lost(context, continuation):
    """Of a tokenizer that joins a sign and the line break behind it, as those of Qwen and Llama 3 do."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(context + continuation + ":\n.")))}
    merges = [(":", "\n"), (".", "\n")]
    tokenizer = Tokenizer(BPE(vocabulary | {"".join(one): 90 + k for k, one in enumerate(merges)}, merges))
    request = encode_pair(tokenizer, context, continuation)
    assert request.context + request.continuation == tuple(tokenizer.encode(context + continuation).ids)
    words = {number: piece for piece, number in tokenizer.get_vocab().items()}
    before = "".join(words[one] for one in request.context)
    assert before
    assert context.rstrip().startswith(before)
    merged = context.rstrip()[-1] in ":." and continuation[0] == "\n"
    assert (before == context.rstrip()) != merged


def test_special_tokens_are_added_nowhere_but_where_the_data_has_them():
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "<s>": 2}, []))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert encode_pair(tokenizer, "a", "b") == Request((0,), (1,))
    assert encode_pair(tokenizer, "a", "b", bos_id=2) == Request((2, 0), (1,))


def test_memory_that_does_not_do_halves_one_context_s_rows_too(monkeypatch):
    import scionlm.evaluation.choices as module

    model, real, sizes = tiny_model(), module._pass, []
    context = tuple(range(1, 31))
    requests = [Request(context, (n, 7)) for n in range(8)]

    def scarce(model, groups, is_shared):
        rows = sum(map(len, groups))
        if rows > 3:
            raise torch.OutOfMemoryError
        sizes.append(rows)
        return real(model, groups, is_shared)

    expected = [by_hand(model, request)[0] for request in requests]
    monkeypatch.setattr(module, "_pass", scarce)
    assert [one.nll for one in score(model, requests, 128)] == pytest.approx(expected, abs=1e-4)
    assert sizes == [2, 2, 2, 2]
    sizes.clear()
    score(model, requests, 128, batch_size=3)
    assert sizes == [3, 3, 2]


def test_memory_that_does_not_do_halves_nothing_where_devices_share_the_weights(monkeypatch):
    """The others would wait for a pass that does not come."""
    import scionlm.evaluation.choices as module

    def scarce(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "_pass", scarce)
    monkeypatch.setattr(module, "lies_in_parts", lambda model: True)
    with pytest.raises(torch.OutOfMemoryError):
        score(tiny_model(), requests_of(2), 128)
