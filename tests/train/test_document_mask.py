"""Positions that begin anew keep attention inside each document: in every family, however documents are packed."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from factories import MODEL_IDS, MODELS, VOCAB_SIZE, tiny_model
from scionlm.data import Batch, Mixture, Order, SamplePlan, TokenStream
from scionlm.data.mixing.windows import IGNORE
from scionlm.families import family_of
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import micro_batches, train_step

SEQ_LEN, SEPARATOR = 48, 0
PACKINGS = ("concat", "best_fit")
LENGTHS = [17, 30, 9, 21, 3, 44, 12, 1, 26, 5, 60, 14]  # with separators; one is empty, one longer than a window


def stream() -> TokenStream:
    rng = np.random.default_rng(7)
    documents = [np.append(rng.integers(1, VOCAB_SIZE, length - 1), SEPARATOR) for length in LENGTHS]
    header = {"tokenizer": {"separator_id": SEPARATOR}}
    return TokenStream(
        [SimpleNamespace(tokens=np.concatenate(documents), document_ends=np.cumsum(LENGTHS), header=header)]
    )


def batch_of(packing: str, document_mask: bool = True) -> Batch:
    plan = SamplePlan({"d": stream()}, Mixture({"d": 1.0}), Order(SEQ_LEN, 1, "main", packing, document_mask))
    return plan.batch(plan.take(plan.num_windows("d")))


def parts(positions: np.ndarray) -> list[slice]:
    """Return the pieces of one row that stand alone."""
    begins = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    return [slice(begin, end) for begin, end in pairwise(begins)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_parts_are_documents_behind_a_separator(packing):
    """So that what follows compares with the documents themselves, not with whatever the positions say."""
    text, ends = stream(), np.cumsum(LENGTHS)
    tokens = text.read(0, text.num_tokens)
    contexts = [
        [SEPARATOR, *tokens[end - length : end - 1].tolist()] for length, end in zip(LENGTHS, ends, strict=True)
    ]
    whole = 0
    batch = batch_of(packing)
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        for part in parts(positions):
            mine = ids[part].tolist()
            assert positions[part].tolist() == list(range(len(mine)))
            if (labels[part] == IGNORE).all():  # padding, or what the last window has seen before
                continue
            inside = [
                context
                for context in contexts
                if any(context[start : start + len(mine)] == mine for start in range(len(context)))
            ]
            assert inside or packing == "concat", "a part is of one document"
            whole += mine in contexts
    assert whole >= (len(LENGTHS) - 1 if packing == "best_fit" else 6)


def logits(model, ids: np.ndarray) -> torch.Tensor:
    """Return the logits before a family scales them."""
    with torch.no_grad():
        last = model.base_model(input_ids=torch.from_numpy(ids), use_cache=False)[0]
        return model.get_output_embeddings()(last)


def trained_logits(model, batch: Batch) -> torch.Tensor:
    """Return the logits that training sees: what the objective makes of a micro-batch, and the head of that."""
    seen = []
    hook = model.base_model.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    with torch.no_grad():
        Objective(model, torch.float32)(*next(micro_batches(batch, len(batch.labels))))
        hook.remove()
        return model.get_output_embeddings()(seen[0])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_a_packed_row_gives_the_logits_of_each_document_alone(model_type, changes, packing):
    model = tiny_model(model_type, **changes)
    batch = batch_of(packing)
    packed = trained_logits(model, batch)
    bare = trained_logits(model, replace(batch, position_ids=None))
    largest = float(packed.abs().max())
    worst = differs = 0.0
    for row, positions in enumerate(batch.position_ids):
        for part in parts(positions):
            alone = logits(model, batch.input_ids[row : row + 1, part])[0]
            worst = max(worst, float((packed[row, part] - alone).abs().max()) / largest)
            differs = max(differs, float((bare[row, part] - alone).abs().max()) / largest)
    # Where a family says that it cannot, asking for it is refused; and it must really be unable.
    assert (worst < 1e-5) == family_of({"model_type": model_type}).packs_documents
    assert differs > 1e-2  # the control: without positions each document sees those before it


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_token_in_one_document_moves_nothing_in_another(packing):
    """The gradient of one document's loss reaches its own inputs and no others'."""
    model = tiny_model()
    batch = batch_of(packing)
    row = next(i for i, positions in enumerate(batch.position_ids) if len(parts(positions)) > 2)
    part = parts(batch.position_ids[row])[1]

    def touched(**positions: torch.Tensor) -> list[int]:
        embedded = model.get_input_embeddings()(torch.from_numpy(batch.input_ids[row : row + 1])).detach()
        embedded.requires_grad_()
        model(inputs_embeds=embedded, use_cache=False, **positions).logits[0, part].square().sum().backward()
        return torch.nonzero(embedded.grad[0].abs().sum(dim=-1)).flatten().tolist()

    positions = torch.from_numpy(batch.position_ids[row : row + 1])
    assert touched(position_ids=positions) == list(range(part.start, part.stop))
    assert touched() == list(range(part.stop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_is_the_sum_over_documents_alone(dtype):
    objective = Objective(tiny_model(), dtype)
    exact = tiny_model()
    batch = batch_of("best_fit")
    with torch.no_grad():
        loss, count, extras = objective(*next(micro_batches(batch, len(batch.labels))))
    alone = torch.zeros(len(batch.labels))
    for row, positions in enumerate(batch.position_ids):
        for part in parts(positions):
            labels = torch.from_numpy(batch.labels[row, part])
            part_logits = logits(exact, batch.input_ids[row : row + 1, part])[0]
            alone[row] += functional.cross_entropy(
                part_logits, labels, ignore_index=IGNORE, reduction="sum"
            ).nan_to_num()
    assert int(count) == sum(LENGTHS)
    close = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert extras["sequence_nll"].tolist() == pytest.approx(alone.tolist(), rel=close)
    assert float(loss) == pytest.approx(float(alone.sum()), rel=close)


@pytest.mark.parametrize("packing", PACKINGS)
def test_micro_batches_of_any_size_give_the_step_of_the_whole(packing):
    """A micro-batch without padding or with one document a row must be masked like its neighbours."""

    def step(size: int, batch: Batch) -> tuple[float, float, list[float]]:
        objective = Objective(tiny_model(), torch.float32)
        optimizer = Optimizer(objective.model, OptimizerSettings())
        result = train_step(objective, optimizer, batch, size, lr=1e-3, clip=0.5)
        return result.nll, result.grad_norm, result.sequence_nll

    batch = batch_of(packing)
    whole = step(len(batch.labels), batch)
    for size in (1, 2, 3):
        parts = step(size, batch)
        assert parts[0] == pytest.approx(whole[0], rel=1e-6)
        assert parts[1] == pytest.approx(whole[1], rel=1e-5)
        assert parts[2] == pytest.approx(whole[2], rel=1e-5)
    bare = step(2, batch_of(packing, document_mask=False))
    assert bare[0] != pytest.approx(whole[0], abs=1e-3)


def test_without_the_mask_there_are_no_positions():
    assert batch_of("concat", document_mask=False).position_ids is None
    pieces = list(micro_batches(batch_of("concat", document_mask=False), 2))
    assert all(len(piece) == 2 for piece in pieces)
    assert all(len(piece) == 3 for piece in micro_batches(batch_of("concat"), 2))
