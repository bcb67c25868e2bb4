"""Layers that cast their own weights, and make their activations again: the same gradients, with less kept."""

import gc

import pytest
import torch

from factories import MODELS, tiny_model
from scionlm.train.objective import Objective


def batch(vocab=300):
    ids = torch.arange(3 * 41).view(3, 41) * 7 % vocab
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def kept_and_gradients(model, dtype, checkpointing):
    """Return the bytes that autograd keeps, the loss and the gradients."""
    objective, kept = Objective(model, dtype, checkpointing=checkpointing), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _, _ = objective(*batch())
    loss.backward()
    return sum(kept.values()), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_made_again_is_what_was_not_kept(checkpointing, dtype):
    more, loss, right = kept_and_gradients(tiny_model(seed=1), dtype, "none")
    less, other, found = kept_and_gradients(tiny_model(seed=1), dtype, checkpointing)
    assert torch.equal(loss, other)
    assert all(torch.equal(right[name], found[name]) for name in right)
    assert less < more
    _, _, changed = kept_and_gradients(tiny_model(seed=2), dtype, checkpointing)
    assert not any(torch.equal(right[name], changed[name]) for name in right)


def test_the_more_is_made_again_the_less_stays():
    """What is alive after the way forward, whoever keeps it."""
    alive = []
    for checkpointing in ("none", "selective", "full"):
        objective = Objective(tiny_model(seed=1), torch.float32, checkpointing=checkpointing)
        loss, _, _ = objective(*batch())
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        alive.append(sum(storages.values()))
        del objective, loss, tensors
    assert alive[2] < alive[1]


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=str)
def test_every_family_has_layers_that_can(model_type, changes):
    found = []
    for checkpointing in ("none", "full"):
        model = tiny_model(model_type, seed=1, **changes).eval()
        objective = Objective(model, torch.bfloat16, checkpointing=checkpointing)
        loss, _, _ = objective(*batch())
        loss.backward()
        found.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_dropout_is_the_same_when_it_is_made_again():
    found = []
    for checkpointing in ("none", "full"):
        model = tiny_model("gpt2", seed=1).train()
        objective = Objective(model, torch.float32, checkpointing=checkpointing)
        torch.manual_seed(5)
        loss, _, _ = objective(*batch())
        loss.backward()
        found.append([loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
