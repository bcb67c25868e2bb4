"""Held-out losses against independent computations."""

import math

import pytest
import torch

from factories import tiny_model
from scionlm.core.errors import DataError
from scionlm.evaluation.loss import domain_losses, held_out_span, model_token_nll
from scionlm.evaluation.rolling import rolling_losses, rolling_windows
from scionlm.sources import load_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def by_hand(model, tokens, seq_len):
    """Sum of -log p over windows of seq_len + 1 that overlap by one, token by token, in float64."""
    total = count = 0
    for start in range(0, len(tokens) - 1, seq_len):
        window = tokens[start : start + seq_len + 1]
        log_p = torch.log_softmax(model(torch.tensor([window[:-1]])).logits[0].double(), -1)
        for position, label in enumerate(window[1:]):
            total -= float(log_p[position, label])
            count += 1
    return total, count


@pytest.mark.parametrize("seq_len", [16, 50, 4096])
def test_the_loss_equals_an_independent_computation(model, data_folder, seq_len):
    losses = domain_losses(model_token_nll(model), data_folder, ["alpha", "beta"], seq_len)
    for name, loss in losses.items():
        stream = data_folder.stream(name, "held_out")
        total, count = by_hand(model, stream.read(0, stream.num_tokens).tolist(), seq_len)
        assert loss.num_tokens == count == stream.num_tokens - 1
        assert loss.nll == pytest.approx(total / count, abs=1e-4)
        assert loss.num_bytes == data_folder.num_bytes(name, "held_out")
        figures = loss.to_dict()
        assert figures["perplexity"] == pytest.approx(math.exp(loss.nll))
        assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / loss.num_bytes, rel=1e-4)


def test_one_changed_weight_changes_the_loss(data_folder):
    other = tiny_model()
    before = domain_losses(model_token_nll(other), data_folder, ["alpha"], 32)["alpha"].nll
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    assert abs(domain_losses(model_token_nll(other), data_folder, ["alpha"], 32)["alpha"].nll - before) > 1e-4


def test_evaluating_twice_gives_the_same_number_and_uses_no_randomness(model, data_folder):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = domain_losses(model_token_nll(model), data_folder, ["alpha"], 32)
    assert torch.equal(state, torch.get_rng_state())
    assert first == domain_losses(model_token_nll(model), data_folder, ["alpha"], 32)


@pytest.mark.parametrize("budget", [1, 10, 100, 10**9])
def test_a_budget_is_kept_to_the_token_and_its_bytes_are_those_of_its_text(model, data_folder, budget):
    stream, tokenizer = data_folder.stream("beta", "held_out"), load_tokenizer(data_folder.tokenizer_folder)
    loss = domain_losses(model_token_nll(model), data_folder, ["beta"], 32, budget)["beta"]
    assert loss.num_tokens == min(budget, stream.num_tokens - 1)
    limit, num_bytes = held_out_span(stream, budget, tokenizer)
    text = tokenizer.decode(stream.read(0, limit).tolist(), skip_special_tokens=True)
    assert num_bytes == len(text.encode())


def test_a_model_with_nan_weights_is_reported_not_scored(data_folder):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(DataError, match="alpha"):
        domain_losses(model_token_nll(broken), data_folder, ["alpha"], 32)


def test_rolling_windows_predict_each_token_once_with_full_context():
    for length in range(1, 40):
        tokens = list(range(1, length + 1))
        predicted = []
        for window, count in rolling_windows(tokens, 0, 8):
            predicted += window[-count:]
            assert len(window) <= 9
            assert len(window) == 9 or length < 8
        assert predicted == tokens


def test_per_document_equals_lm_evals_rolling_loglikelihood(model, data_folder, tiny_folder):
    """The same text through lm-eval's own Hugging Face backend."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    seq_len = 32
    hf_tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    theirs = HFLM(pretrained=model, tokenizer=hf_tokenizer, max_length=seq_len, batch_size=1)
    tokenizer = load_tokenizer(tiny_folder)
    stream = data_folder.stream("alpha", "held_out")
    texts = [tokenizer.decode(stream.read(d.start, d.end - d.start).tolist()) for d in stream.documents()]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i) for i, text in enumerate(texts)
    ]
    expected = -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True))
    mine = rolling_losses(model, data_folder, ["alpha"], seq_len)["alpha"]
    assert mine.nll_sum == pytest.approx(expected, rel=1e-4)
    assert mine.nll == pytest.approx(expected / mine.num_tokens, abs=1e-4)
    assert mine.num_bytes == sum(len(text.encode()) for text in texts)
    # Negative control: another window length is another number.
    other = rolling_losses(model, data_folder, ["alpha"], 16)["alpha"]
    assert abs(other.nll - mine.nll) > 1e-4
