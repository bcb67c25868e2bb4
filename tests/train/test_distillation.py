"""What a teacher adds to an objective: hidden states, projections, weights that move; alone, without a run."""

import pytest
import torch

from factories import MODEL_IDS, MODELS, tiny_model
from scionlm.data.mixing.windows import IGNORE
from scionlm.families.models import layers_of
from scionlm.schedules import Piece, Schedule
from scionlm.train.distillation import Distillation, DistillSettings
from scionlm.train.hidden_loss import LayerOutputs, hidden_error
from scionlm.train.objective import Objective
from scionlm.train.teacher import Teacher

ALWAYS = Schedule((Piece("constant", "constant", 10, 1.0, 1.0),))
FADING = Schedule((Piece("decay", "linear", 4, 1.0, 0.0), Piece("constant", "constant", 6, 0.0, 0.0)))


def batch(seed=0):
    ids = torch.randint(1, 300, (3, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    labels[1, 4:] = IGNORE
    return ids[:, :-1], labels


def objective_of(student, teacher, dtype=torch.float32, **settings):
    values = DistillSettings(**({"weight": 0.5, "schedule": ALWAYS} | settings))
    for parameter in teacher.parameters():  # as loading does it: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    taught = Teacher(teacher, sorted(set((values.layers or {}).values())))
    return Objective(student, dtype, 0.0, Distillation(student, taught, values))


def gradients(objective, *arguments):
    loss, _, extras = objective(*arguments)
    parameters = dict(objective.model.named_parameters()) | objective.projections
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), extras, dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_layers_give_out_what_transformers_calls_hidden_states(model_type, changes):
    model = tiny_model(model_type, **changes)
    outputs = LayerOutputs(model, [0, 2, 4])
    ids = batch()[0]
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    seen = outputs.take()
    assert list(seen) == [0, 2, 4]
    assert torch.equal(seen[0], hidden[1])
    assert torch.equal(seen[2], hidden[3])
    assert not torch.equal(seen[4], hidden[5])  # transformers shows the last one behind the final norm
    assert outputs.take() == {}
    outputs.close()
    model(input_ids=ids)
    assert outputs.take() == {}


def test_errors_of_hidden_states_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    relative = ((mine - theirs) ** 2).sum(-1) / (theirs**2).sum(-1)
    torch.testing.assert_close(hidden_error("mse", mine, theirs), relative.float())
    cosine = (mine * theirs).sum(-1) / mine.norm(dim=-1) / theirs.norm(dim=-1)
    torch.testing.assert_close(hidden_error("cosine", mine, theirs), (1 - cosine).float())
    for name in ("mse", "cosine"):
        assert hidden_error(name, theirs, theirs).abs().max() < 1e-6
        assert hidden_error(name, torch.zeros_like(theirs), torch.zeros_like(theirs)).isfinite().all()
    nothing = torch.zeros(1, 1, 8, requires_grad=True)
    for name in ("mse", "cosine"):  # a state without a length has an error and a gradient all the same
        for pair in ((nothing, theirs[:1, :1]), (theirs[:1, :1], nothing)):
            error = hidden_error(name, *pair).sum()
            assert error.isfinite()
            assert torch.autograd.grad(error, nothing)[0].abs().max() < 1e8
    giant = theirs.clone()
    giant[:, 0] *= 1e3  # a token with a giant state counts like any other
    torch.testing.assert_close(hidden_error("mse", giant * 0.9, giant), torch.full((2, 5), 0.01))


def test_the_loss_is_the_sum_of_its_parts_over_tokens_that_count():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, num_hidden_layers=7)
    objective = objective_of(student, teacher, hidden_weight=2.0, layers={0: 1, 4: 6})
    ids, labels = batch()
    loss, _, extras = objective(ids, labels)
    plain, count, _ = Objective(student, torch.float32)(ids, labels)
    with torch.no_grad():
        mine = student(input_ids=ids, use_cache=False)
        theirs = teacher(input_ids=ids, use_cache=False)
        counts = labels != IGNORE
        log_p, log_q = mine.logits.log_softmax(-1), theirs.logits.log_softmax(-1)
        diverged = ((log_q.exp() * (log_q - log_p)).sum(-1) * counts).sum()
        seen, taught = LayerOutputs(student, [0, 4]), LayerOutputs(teacher, [1, 6])
        student(input_ids=ids)
        teacher(input_ids=ids)
        states, wanted = seen.take(), taught.take()
        error = sum(hidden_error("mse", states[i], wanted[j]) for i, j in ((0, 1), (4, 6))) / 2
        error = (error * counts).sum()
    assert float(extras["divergence_nats"]) == pytest.approx(float(diverged), rel=1e-5)
    assert float(extras["hidden_error_ratio"]) == pytest.approx(float(error), rel=1e-5)
    assert float(extras["sequence_nll"].sum()) == pytest.approx(float(plain.detach()), rel=1e-6)
    total = 0.5 * float(plain.detach()) + 0.5 * float(diverged) + 2.0 * float(error)
    assert float(loss.detach()) == float(extras["loss_nats"]) == pytest.approx(total, rel=1e-5)
    assert int(count) == int(counts.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_learns_nothing_from_it(dtype):
    student, teacher = tiny_model(seed=1), tiny_model(seed=1)
    own = {"weight": 1.0, "hidden_weight": 1.0, "layers": {i: i for i in range(5)}}
    loss, extras, found = gradients(objective_of(student, teacher, dtype, **own), *batch())
    assert float(loss) == 0
    assert all(gradient is None or gradient.abs().max() < 1e-6 for gradient in found.values())
    assert float(extras["sequence_nll"].sum()) > 10
    with torch.no_grad():
        teacher.model.layers[1].mlp.up_proj.weight[0, 0] += 1  # the control: one weight of the teacher
    loss, _, found = gradients(objective_of(student, teacher, dtype, **own), *batch())
    assert float(loss) > 1e-6
    assert max(gradient.abs().max() for gradient in found.values() if gradient is not None) > 1e-4


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=MODEL_IDS)
def test_in_every_family_a_teacher_makes_what_the_same_student_makes(model_type, changes):
    capped = {"final_logit_softcapping": 2.5} if model_type.startswith("gemma") else {}
    student, teacher, other = (tiny_model(model_type, seed=seed, **changes, **capped) for seed in (1, 1, 2))
    own = {"weight": 1.0, "hidden_weight": 1.0, "layers": {0: 0, 4: 4}}
    assert float(objective_of(student.eval(), teacher, **own)(*batch())[0].detach()) == 0
    assert float(objective_of(student, other, **own)(*batch())[0].detach()) > 1


def test_no_pass_leaves_a_graph_behind():
    objective = objective_of(tiny_model(seed=1), tiny_model(seed=2), hidden_weight=1.0, layers={1: 1})
    ids, labels = batch()
    objective(ids, labels)
    objective.token_nll(ids, labels)
    assert objective.distillation.outputs.take() == {}
    assert objective.distillation.teacher(ids).layers.keys() == {1}


def test_weight_zero_is_plain_training_to_the_bit():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    plain, _, bare = gradients(Objective(student, torch.float32), *batch())
    for settings in ({"weight": 0.0}, {"weight": 0.7, "schedule": FADING}):
        objective = objective_of(student, teacher, **settings)
        objective.at_step(4)
        asked = objective.teacher_seconds
        loss, extras, found = gradients(objective, *batch())
        assert torch.equal(loss, plain)
        assert extras.keys() == {"sequence_nll"}
        assert objective.teacher_seconds == asked  # and the teacher is not even asked
        assert all(torch.equal(found[name], bare[name]) for name in bare)
    objective.at_step(3)
    loss, extras, _ = gradients(objective, *batch())
    assert not torch.equal(loss, plain)
    assert objective.teacher_seconds > asked
    assert float(extras["loss_nats"]) == pytest.approx(
        (1 - 0.175) * float(plain) + 0.175 * float(extras["divergence_nats"]), rel=1e-5
    )


def test_what_is_released_holds_neither_student_nor_teacher():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    objective_of(student, teacher).release()
    assert all(tensor.is_meta for model in (student, teacher) for tensor in model.parameters())


def test_projections_learn_where_widths_differ_and_are_no_part_of_the_model():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden_size=48)
    objective = objective_of(student, teacher, hidden_weight=1.0, layers={1: 1, 4: 4})
    assert objective.projections.keys() == {"projections.1-1", "projections.4-4"}
    assert {tuple(p.shape) for p in objective.projections.values()} == {(48, 32)}
    _, _, found = gradients(objective, *batch())
    assert all(found[name].abs().max() > 0 for name in objective.projections)
    assert not any("projection" in name for name in student.state_dict())
    square = objective_of(student, tiny_model(seed=2), hidden_weight=1.0, layers={1: 1})
    assert square.projections == {}


def test_a_teacher_is_frozen_and_no_module_of_the_students():
    student, teacher = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=2)
    objective = objective_of(student, teacher)
    objective.train()
    assert not teacher.training  # its dropout stays off
    assert student.training
    names = {name for name, _ in objective.named_parameters()}
    assert names == {f"model.{name}" for name, _ in student.named_parameters()}
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    objective(*batch())[0].backward()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_documents_are_kept_apart_in_the_teacher_too():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    objective = objective_of(student, teacher, weight=1.0)
    ids, labels = batch()
    labels = torch.where(torch.arange(10) < 5, IGNORE, ids)  # only what stands in the second document
    positions = torch.arange(10).remainder(5).expand(3, 10)
    other = ids.clone()
    other[:, :5] = 7
    apart = [float(objective(x, labels, positions)[0].detach()) for x in (ids, other)]
    together = [float(objective(x, labels)[0].detach()) for x in (ids, other)]
    assert apart[0] == pytest.approx(apart[1], rel=1e-5)
    assert together[0] != pytest.approx(together[1], rel=1e-3)


def test_compiled_passes_give_the_loss_and_gradients_of_eager_ones():
    found = []
    for compiled in (False, True):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2, hidden_size=48)
        torch.manual_seed(0)
        objective = objective_of(student, teacher, hidden_weight=1.0, layers={1: 1}, temperature=2.0, top_k=5)
        if compiled:
            objective.compile(backend="aot_eager")
            for layer in (*layers_of(student), *layers_of(teacher)):
                assert hasattr(layer.forward, "_torchdynamo_orig_callable")
        objective.at_step(0)
        found.append(gradients(objective, *batch()))
    (loss, _, mine), (other, _, theirs) = found
    assert float(loss) == pytest.approx(float(other), rel=1e-5)
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=1e-4) for name in mine)
