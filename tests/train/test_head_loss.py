"""The losses of the head against a plain float64 reference, gradients included, whatever the chunks are."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.data.mixing.windows import IGNORE
from scionlm.families.logits import LogitScaling, logit_scaling
from scionlm.train import head_loss
from scionlm.train.divergence import DIVERGENCES
from scionlm.train.head_loss import HeadSettings, HeadTargets, head_losses
from scionlm.train.objective import Objective

TOKENS, HIDDEN, VOCAB, TEACHER_HIDDEN = 23, 7, 41, 5
PLAIN = LogitScaling()
few = settings(max_examples=60)


def scaled(product, scaling):
    product = product * scaling.scale
    return product if scaling.cap is None else scaling.cap * torch.tanh(product / scaling.cap)


def divergence_of(name, log_p, log_q):
    """A divergence by its definition, through torch's own pieces."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    if name == "reverse_kl":
        return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((p * (log_p - middle)) + (q * (log_q - middle))).sum(-1) / 2


def grouped(log_p, top):
    """The top tokens and all others as one."""
    rest = log_p.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, top), rest], dim=1)


def reference(hidden, weight, labels, settings, targets):
    """The loss with all logits at once."""
    logits = scaled(hidden @ weight.T, settings.scaling)
    counts = labels != IGNORE
    loss = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    if targets is not None:
        both = min(len(weight), len(targets.weight))
        teacher = scaled(targets.hidden @ targets.weight.T, targets.scaling)[:, :both]
        log_p = functional.log_softmax(logits[:, :both] / settings.temperature, -1)
        log_q = functional.log_softmax(teacher / settings.temperature, -1)
        if settings.top_k:
            top = log_q.topk(settings.top_k).indices
            log_p, log_q = grouped(log_p, top), grouped(log_q, top)
        diverged = settings.temperature**2 * divergence_of(settings.divergence, log_p, log_q)
        loss = (1 - targets.share) * loss + targets.share * diverged * counts
    return (loss + settings.z_loss * logits.logsumexp(-1) ** 2 * counts).sum()


def example(seed=0, teacher_vocab=VOCAB, dtype=torch.float64, share=0.3):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[2] = labels[-1] = IGNORE
    targets = HeadTargets(
        normal(TOKENS, TEACHER_HIDDEN), normal(teacher_vocab, TEACHER_HIDDEN), LogitScaling(0.7, 4.0),
        torch.tensor(share, dtype=dtype),
    )  # fmt: skip
    return normal(TOKENS, HIDDEN).requires_grad_(), normal(VOCAB, HIDDEN).requires_grad_(), labels, targets


def small_chunks(patch, rows, block, turned=False):
    patch.setattr(head_loss, "CHUNK_BYTES", rows * VOCAB * 8)
    patch.setattr(head_loss, "BLOCK_BYTES", block * VOCAB * 4)
    patch.setattr(head_loss, "_ALIGNED", 2)
    patch.setattr(head_loss, "_TURNED", turned)


@few
@given(
    seed=st.integers(0, 99), name=st.sampled_from(sorted(DIVERGENCES)), heat=st.floats(0.3, 8),
    top_k=st.none() | st.integers(1, VOCAB - 6), z_loss=st.sampled_from([0.0, 0.01]), share=st.floats(0, 1),
    scale=st.floats(0.2, 3), cap=st.none() | st.floats(1, 30), teacher_vocab=st.integers(VOCAB - 4, VOCAB + 4),
    rows=st.integers(1, TOKENS + 5), block=st.integers(1, TOKENS + 5), taught=st.booleans(), turned=st.booleans(),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_definition(
    seed, name, heat, top_k, z_loss, share, scale, cap, teacher_vocab, rows, block, taught, turned
):
    hidden, weight, labels, targets = example(seed, teacher_vocab, share=share)
    targets = targets if taught else None
    made_of = HeadSettings(LogitScaling(scale, cap), z_loss, name, heat, top_k)
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, rows, block, turned)
        found = head_losses(hidden, weight, labels, made_of, targets)
        with torch.no_grad():
            unlearned = head_losses(hidden, weight, labels, made_of, targets)
    mine = torch.autograd.grad(found.loss, (hidden, weight))
    plain = reference(hidden, weight, labels, made_of, targets)
    for one, other in zip(mine, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, plain, rtol=1e-11, atol=1e-11)
    bare = reference(hidden, weight, labels, replace(made_of, z_loss=0.0), None)
    torch.testing.assert_close(found.nll.sum(), bare, rtol=1e-11, atol=1e-11)
    for one, other in zip(found, unlearned, strict=True):
        assert torch.equal(one, other)
    assert found.nll[labels == IGNORE].count_nonzero() == 0


@pytest.mark.parametrize("where", ["student", "head", "teacher", "label"])
def test_the_comparison_sees_a_single_changed_number(where):
    """The control of the test above."""
    hidden, weight, labels, targets = example()
    made_of = HeadSettings(PLAIN)
    before = head_losses(hidden, weight, labels, made_of, targets).loss.detach()
    with torch.no_grad():
        if where == "label":
            labels[0] = (labels[0] + 1) % VOCAB
        else:
            {"student": hidden, "head": weight, "teacher": targets.weight}[where][0, 0] += 1e-4
    after = head_losses(hidden, weight, labels, made_of, targets).loss.detach()
    assert abs(float(after - before)) > 1e-7


def test_the_gradient_is_that_of_finite_differences():
    hidden, weight, labels, targets = example()
    for name in DIVERGENCES:
        made_of = HeadSettings(LogitScaling(0.8, 3.0), 0.01, name, 1.7, 6)

        def loss(made_of=made_of):
            return head_losses(hidden, weight, labels, made_of, targets).loss

        for part, gradient in zip((hidden, weight), torch.autograd.grad(3 * loss(), (hidden, weight)), strict=True):
            for place, slope in zip(part.data.view(-1).split(1), gradient.flatten().tolist(), strict=True):
                ends = []
                for step in (1e-5, -2e-5):
                    place.add_(step)
                    ends.append(float(loss().detach()))
                place.add_(1e-5)
                assert 3 * (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_way_back_cannot_be_gone_twice_in_silence():
    """What is kept for it is scaled in place."""
    hidden, weight, labels, targets = example()
    loss = head_losses(hidden, weight, labels, HeadSettings(PLAIN), targets).loss
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, top_k, heat):
    hidden, weight, labels, _ = example(dtype=torch.float32)
    targets = HeadTargets(hidden.detach(), weight.detach(), PLAIN, torch.tensor(1.0))
    found = head_losses(hidden, weight, labels, HeadSettings(PLAIN, 0.0, name, heat, top_k), targets)
    gradients = torch.autograd.grad(found.loss, (hidden, weight))
    assert abs(float(found.divergence)) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5
    if name == "forward_kl" and top_k is None:  # p - q: to the last bit
        assert float(found.divergence) == 0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)
    with torch.no_grad():
        other = targets._replace(weight=targets.weight.roll(1, 0))
        apart = head_losses(hidden, weight, labels, HeadSettings(PLAIN, 0.0, name, heat, top_k), other)
    assert float(apart.loss) > 0.1


@few
@given(
    name=st.sampled_from(sorted(DIVERGENCES)), seed=st.integers(0, 99), top_k=st.none() | st.integers(1, 12),
    heat=st.sampled_from([0.05, 0.1, 1.0, 20.0]), gap=st.sampled_from([1.0, 30.0, 300.0]),
)  # fmt: skip
def test_in_float32_a_teacher_that_is_sure_and_any_temperature_are_exact(name, seed, top_k, heat, gap):
    """Where probabilities of both are too small for float32, against float64 on the same logits."""
    hidden, weight, labels, targets = example(seed, dtype=torch.float32, share=1.0)
    with torch.no_grad():
        targets = targets._replace(scaling=LogitScaling(gap), weight=targets.weight / 10)
        weight *= gap / 10
    made_of = HeadSettings(PLAIN, 0.0, name, heat, top_k)
    found = head_losses(hidden, weight, labels, made_of, targets)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    theirs = targets._replace(hidden=targets.hidden.double(), weight=targets.weight.double(), share=torch.tensor(1.0))
    wanted = reference(*exact, labels, made_of, theirs)
    rounding = TOKENS * (2e-7 * heat**2 + 1e-6 * gap)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4, abs=rounding)
    gradients = torch.autograd.grad(found.loss, (hidden, weight)), torch.autograd.grad(wanted, exact)
    for one, other in zip(*gradients, strict=True):
        # log(p / q) is as large as gap / heat, and float32 keeps seven digits of it; and logits of that size are
        # rounded in proportion, which moves each probability, and so its share of log(p / q), by as much again.
        large = max(gap / heat, 1)
        rounding = 1e-6 * large * max(large / 50, 1)
        assert float((one - other).abs().max()) < 1e-4 * float(other.abs().max()) + rounding


@few
@given(name=st.sampled_from(sorted(DIVERGENCES)), seed=st.integers(0, 99), top_k=st.integers(1, VOCAB))
def test_telling_fewer_tokens_apart_never_finds_more(name, seed, top_k):
    hidden, weight, labels, targets = example(seed)

    def diverged(k):
        return float(head_losses(hidden, weight, labels, HeadSettings(PLAIN, 0.0, name, 1.0, k), targets).divergence)

    assert -1e-9 <= diverged(top_k) <= diverged(None) + 1e-9


def test_share_zero_is_cross_entropy_to_the_last_bit():
    hidden, weight, labels, targets = example(dtype=torch.float32, share=0.0)
    alone = head_losses(hidden, weight, labels, HeadSettings(PLAIN))
    beside = head_losses(hidden, weight, labels, HeadSettings(PLAIN), targets)
    assert torch.equal(alone.loss, beside.loss)
    for one, other in zip(*(torch.autograd.grad(f.loss, (hidden, weight)) for f in (alone, beside)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden, weight, labels, targets = example()
    both = torch.autograd.grad(head_losses(hidden, weight, labels, HeadSettings(PLAIN), targets).loss, (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    head_losses(hidden, weight, labels, HeadSettings(PLAIN), targets).loss.backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "head")
    learned = weight if frozen == "hidden" else hidden
    torch.testing.assert_close(learned.grad, both[frozen == "hidden"])


def test_no_tokens_have_no_loss():
    hidden, weight, labels, targets = example()
    targets = targets._replace(hidden=targets.hidden[:0])
    for taught in (None, targets):
        found = head_losses(hidden[:0], weight, labels[:0], HeadSettings(PLAIN), taught)
        gradients = torch.autograd.grad(found.loss, (hidden, weight))
        assert float(found.loss.detach()) == 0
        assert len(found.nll) == 0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("turned", [False, True])
def test_bf16_products_have_float32_softmax_and_a_float32_gradient_of_the_head(turned, monkeypatch):
    hidden, weight, labels, targets = example(dtype=torch.float32)
    small_chunks(monkeypatch, 4, 2, turned)
    low = hidden.detach().bfloat16().requires_grad_()
    targets = targets._replace(hidden=targets.hidden.bfloat16(), weight=targets.weight.bfloat16())
    found = head_losses(low, weight, labels, HeadSettings(PLAIN), targets)
    of_hidden, of_weight = torch.autograd.grad(found.loss, (low, weight))
    assert (of_hidden.dtype, of_weight.dtype, found.nll.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = reference(hidden, weight, labels, HeadSettings(PLAIN), targets._replace(
        hidden=targets.hidden.float(), weight=targets.weight.float()))  # fmt: skip
    assert float(found.loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-2)
    for one, other in zip((of_hidden, of_weight), torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 2e-2


def test_logits_of_a_long_batch_are_never_there_at_once():
    """By the largest product that is made; `benchmarks/distillation.py` measures the memory."""
    vocab, hidden_size = 4096, 16
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    rows = 2048
    hidden = torch.randn(4 * rows, hidden_size, requires_grad=True)
    labels = torch.zeros(4 * rows, dtype=torch.long)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "CHUNK_BYTES", rows * vocab * 4)
        patch.setattr(head_loss, "BLOCK_BYTES", 2**18)
        biggest = []
        product = torch.Tensor.__matmul__
        patch.setattr(torch.Tensor, "__matmul__", lambda a, b: biggest.append(len(a) * b.shape[1]) or product(a, b))
        head_losses(hidden, weight, labels, HeadSettings(PLAIN)).loss.backward()
    assert max(biggest) == rows * vocab


def test_between_the_products_a_processor_works_on_what_its_cache_holds(monkeypatch):
    seen = []
    own = head_loss._losses_of
    monkeypatch.setattr(head_loss, "_losses_of", lambda logits, *rest: seen.append(logits.shape) or own(logits, *rest))
    small_chunks(monkeypatch, 10, 4)
    hidden, weight, labels, _ = example()
    head_losses(hidden, weight, labels, HeadSettings(PLAIN))
    assert [rows for rows, _ in seen] == [4, 4, 4, 4, 4, 3]  # chunks of 8, 8 and 7 rows, as even as can be


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_the_objective_is_the_familys_own_loss_with_its_own_gradients(model_type, changes):
    """The model's own head, scale and cap, in every family, against what the objective makes of its hidden states."""
    capped = {"final_logit_softcapping": 2.5} if model_type.startswith("gemma") else {}
    model = tiny_model(model_type, **changes, **capped).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, 300, (2, 9))
    labels = ids[:, 1:]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    own = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss, count, extras = Objective(model, torch.float32)(ids[:, :-1], labels)
    assert count == labels.numel()
    assert extras.keys() == {"sequence_nll"}
    assert float(loss.detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    largest = 0.0
    for name, mine, theirs in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        largest = max(largest, float(theirs.abs().max()))
        assert float((mine - theirs).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize(
    ("model_type", "changes", "wanted"),
    [
        ("llama", {}, LogitScaling()),
        ("granite", {"logits_scaling": 8.0}, LogitScaling(1 / 8)),
        ("cohere2", {}, LogitScaling(0.0625)),
        ("cohere2", {"logit_scale": 2}, LogitScaling(2)),
        ("gemma2", {}, LogitScaling(1.0, 30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitScaling()),
        ("gemma3_text", {}, LogitScaling()),
        ("gemma3_text", {"final_logit_softcapping": 30}, LogitScaling(1.0, 30)),
    ],
)
def test_scales_are_read_from_the_configuration(model_type, changes, wanted):
    assert logit_scaling({"model_type": model_type} | changes) == wanted


@pytest.mark.parametrize("value", [0, -1.0, "big", True])
def test_a_scale_that_is_no_positive_number_is_refused(value):
    from scionlm.core.errors import DataError

    with pytest.raises(DataError, match="logit_scale"):
        logit_scaling({"model_type": "cohere2", "logit_scale": value})
