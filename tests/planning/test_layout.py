"""How a run is laid out on devices, and how many sequences go through in a pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scionlm import api
from scionlm.core.errors import UsageError
from scionlm.planning.layout import choose_layout, fitting_rows
from scionlm.recipes.layout import Devices, Training, with_rows
from scionlm.recipes.presets import load_recipe

GB = 10**9


def needed(whole, fixed=0):
    return lambda shards: fixed + whole // shards


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 500 * GB), st.integers(1, 200 * GB), st.booleans())
def test_a_copy_lies_on_as_few_devices_as_can_hold_it(nodes, per_node, whole, memory, known):
    world = nodes * per_node
    found = choose_layout("auto", world, per_node, needed(whole), memory if known else None)
    assert found.shards * found.replicas == world
    names = {1: "ddp", world: "fsdp"}
    assert found.name == ("single" if world == 1 else names.get(found.shards, "hsdp"))
    if found.shards > 1:
        fewer = {"hsdp": 1, "fsdp": per_node if nodes > 1 and per_node > 1 else 1}[found.name]
        assert needed(whole)(fewer) > 0.85 * memory


def test_the_rule_at_its_edges():
    assert choose_layout("auto", 8, 8, needed(68 * GB), 80 * GB).name == "ddp"
    assert choose_layout("auto", 8, 8, needed(69 * GB), 80 * GB).name == "fsdp"
    assert choose_layout("auto", 16, 8, needed(69 * GB), 80 * GB).name == "hsdp"
    assert choose_layout("auto", 16, 8, needed(8 * 69 * GB), 80 * GB).name == "fsdp"
    assert choose_layout("auto", 16, 1, needed(69 * GB), 80 * GB).name == "fsdp"
    assert choose_layout("ddp", 16, 8, needed(10**15), 80 * GB).name == "ddp"
    assert "GiB" in choose_layout("auto", 8, 8, needed(69 * GB), 80 * GB).why


@pytest.mark.parametrize(("world", "per_node"), [(8, 8), (4, 1)])
def test_copies_of_shares_need_several_machines_of_several_devices(world, per_node):
    with pytest.raises(UsageError, match="hsdp needs several machines"):
        choose_layout("hsdp", world, per_node, needed(1), None)


@given(st.integers(1, 1000), st.integers(1, 10**6), st.integers(1, 10**8))
def test_sizes_that_fit(most, each, memory):
    found = fitting_rows(most, lambda rows: rows * each, memory)
    assert found == sorted(set(found))
    assert found[0] == 1
    assert all(rows <= most and (rows == 1 or rows * each <= 0.85 * memory) for rows in found)
    assert most in found or most * each > 0.85 * memory or most == 1


@pytest.fixture
def overrides(tiny_folder, data_folder):
    return {"source": str(tiny_folder), "data.dir": str(data_folder.path), "data.mixture": None, "data.seq_len": 24,
            "train.global_batch_tokens": 24 * 64, "inherit.layers": 2}  # fmt: skip


def test_a_plan_for_many_devices(overrides):
    one = api.plan("inheritune-mini", overrides, device="h100")
    many = api.plan("inheritune-mini", overrides, device="h100", devices=16)
    assert (one["devices"], one["layout"]["name"]) == (1, "single")
    assert (many["devices"], many["layout"]["name"]) == (16, "ddp")
    assert many["seconds"] == pytest.approx(one["seconds"] / 16)
    shared = api.plan("inheritune-mini", overrides | {"train.parallel": "hsdp"}, device="h100", devices=16)
    assert shared["layout"] | {"why": ""} == {"name": "hsdp", "shards": 8, "replicas": 2, "why": ""}
    for part in ("weights", "gradients", "optimizer"):
        assert shared["memory_by_part"][part] == pytest.approx(one["memory_by_part"][part] / 8, abs=8)
    with pytest.raises(UsageError, match="do not make machines"):
        api.plan("inheritune-mini", overrides, device="h100", devices=12, per_node=8)


def test_processes_on_one_processor_are_no_faster_together(overrides):
    one, two = (api.plan("inheritune-mini", overrides, devices=n) for n in (1, 2))
    assert two["seconds"] == pytest.approx(one["seconds"])
    assert two["device_memory_bytes"] == one["device_memory_bytes"] // 2


def test_activations_that_are_made_again_take_less(overrides):
    overrides |= {"inherit.layers": 5}
    sizes = [
        api.plan("inheritune-mini", overrides | {"train.activation_checkpointing": name})["memory_by_part"][
            "activations"
        ]
        for name in ("none", "selective", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_plan_takes_the_largest_pass_that_fits(overrides):
    found = api.plan("inheritune-mini", overrides | {"train.micro_batch_size": "auto"}, device="h100")
    assert found["micro_batch_size"] == 64
    asked = api.plan("inheritune-mini", overrides | {"train.micro_batch_size": 64}, device="h100")
    assert found["memory_bytes_per_device"] == asked["memory_bytes_per_device"]


def test_what_is_left_open_is_closed_everywhere(overrides):
    stages = [{"name": "a", "train": {"steps": 2}}, {"name": "b", "train": {"steps": 2, "micro_batch_size": "auto"}},
              {"name": "c", "train": {"steps": 2, "micro_batch_size": 3}}]  # fmt: skip
    recipe = load_recipe("inheritune-mini", overrides | {"stages": stages, "train.micro_batch_size": "auto"})
    assert Training(recipe, {}).is_open
    closed = with_rows(recipe, 5)
    assert not Training(closed, {}).is_open
    assert [stage.train.micro_batch_size for stage in closed.resolved_stages] == [5, 5, 3]
    assert Devices("cpu", "fp32", None, 8, 4).processors == 2
