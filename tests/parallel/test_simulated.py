"""A world of 128 that is not there: every line of the sharded path, on one process and without any messages."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from factories import tiny_model
from scionlm.parallel.placing import mesh_of, on_processor
from scionlm.parallel.ranks import Ranks
from scionlm.parallel.runtime import Runtime
from scionlm.train.average import Average, AverageSettings
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import own_batch, train_step

WORLD, PER_NODE = 128, 8


class Simulated(Ranks):
    """One of many, which hears from the others what it says itself."""

    world, local_world = WORLD, PER_NODE

    def __init__(self, rank):
        self.rank, self.local_rank = rank, rank % PER_NODE

    def gather(self, value):
        return [value] * WORLD

    def on_main(self, work):
        return work()

    def together(self, work):
        return work()


@pytest.fixture
def ranks(rank):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mesh_of.cache_clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    yield Simulated(rank)
    dist.destroy_process_group()
    mesh_of.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
# What DDP sends, nobody can pretend to send; and torch remembers the meshes of a process, so each layout has one rank.
@pytest.mark.parametrize(("rank", "shards", "layout"), [(77, 128, "fsdp"), (0, 8, "hsdp")])
def test_a_step_in_a_world_of_128(ranks, shards, layout, precision, plan_of_two):
    runtime = Runtime("cpu", "a processor", 1, precision, ranks, shards)
    assert runtime.layout == layout
    model = tiny_model(seed=1)
    objective = Objective(model, runtime.compute_dtype, checkpointing="selective", runtime=runtime)
    optimizer = Optimizer(model, OptimizerSettings(name="muon"))
    average = Average(model, AverageSettings("ema", 0.9, 0, 1))
    samples = plan_of_two.take(256)
    batch = own_batch(plan_of_two, samples, ranks)
    assert len(batch.input_ids) == 2
    result = train_step(objective, optimizer, batch, 1, 1e-3, 1.0)
    assert result.num_tokens == WORLD * batch.labels.size
    average.update(1)
    held = Learner(objective, optimizer, Guard(0), average).tensors()
    for name, parameter in held["weights"].items():
        assert isinstance(parameter, DTensor)
        copy = on_processor(parameter, runtime)
        assert copy.shape == parameter.shape
        assert copy.to_local().numel() <= -(-parameter.shape[0] // shards) * parameter[0].numel(), name
    losses = objective.token_nll(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels))
    assert losses.shape == batch.labels.shape


def test_blocks_cover_what_is_dealt_out():
    for count in (1, 5, 128, 129, 300):
        items = list(range(count))
        dealt = []
        for rank in range(WORLD):
            mine, size = Simulated(rank).block_of(items)
            assert len(mine) <= size == -(-count // WORLD)
            dealt += mine
        assert dealt == items
