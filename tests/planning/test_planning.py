"""`scion plan`: sizes, memory, time and the learning rate before anything is spent."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import tiny_model
from scionlm import api
from scionlm.cli import main as cli
from scionlm.core import devices
from scionlm.core.devices import GPUS, gpu_by_name, this_machine
from scionlm.core.errors import UsageError
from scionlm.families import count_parameters, flops_per_token
from scionlm.families.causal import KEPT_LENGTH
from scionlm.parallel.runtime import Runtime
from scionlm.planning.curve import draw
from scionlm.planning.memory import MemoryRequest, checkpoint_bytes, optimizer_bytes, training_memory
from scionlm.recipes import calibrate, planning
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.layout import Devices, shared_layout
from scionlm.recipes.planning import find_device, plan_recipe, trainings_of
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.recipes.selection import plan_of
from scionlm.recipes.shear_steps import with_target
from scionlm.sources import open_folder
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings

quick = settings(max_examples=100)


@pytest.fixture
def overrides(tiny_folder, data_folder):
    return {
        "source": str(tiny_folder),
        "data.dir": str(data_folder.path),
        "data.mixture": None,
        "data.seq_len": 24,
        "inherit.layers": 3,
        "train.global_batch_tokens": 96,
        "train.steps": 10,
    }


@pytest.fixture
def recipe(overrides):
    return load_recipe("inheritune-mini", overrides)


def test_a_plan_says_what_the_run_is(recipe):
    found = plan_recipe(recipe, "h100")
    assert found["num_parameters"] == sum(found["parameters_by_part"].values())
    assert found["num_tokens"] == 960
    assert found["num_steps"] == 10
    assert found["models_trained"] == 2  # with the control
    assert found["memory_bytes_per_device"] == sum(found["memory_by_part"].values())
    assert found["flops"] == sum(stage["flops"] for stage in found["stages"])
    assert found["seconds"] > 0
    assert json.loads(json.dumps(found)) == found


def test_operations_and_parameters_are_the_childs_not_the_sources(recipe, tiny_folder):
    found = plan_recipe(recipe)
    config = json.loads((tiny_folder / "config.json").read_text())
    child = config | {"num_hidden_layers": 3}
    assert found["num_parameters"] == count_parameters(child)["total"]
    assert found["flops"] == 960 * flops_per_token(child, 24)
    assert found["num_parameters"] < count_parameters(config)["total"]


def test_a_faster_device_takes_less_time_and_the_table_is_said(recipe):
    times = [plan_recipe(recipe, name)["seconds"] for name in ("a10", "a100", "h100")]
    assert times[0] > times[1] > times[2]
    assert plan_recipe(recipe, "h100")["seconds_known_from"] == "device table"
    with pytest.raises(UsageError, match=r"abacus is not in the table \(known: B300"):
        find_device("abacus")


def test_stages_are_planned_each_with_its_schedule(overrides):
    stages = [
        {"name": "long", "train": {"steps": 30}, "schedule": {"name": "constant", "warmup": 3}},
        {"name": "anneal", "train": {"steps": 10}, "schedule": {"name": "linear", "warmup": 0, "min_lr_ratio": 0.0}},
    ]
    found = plan_recipe(load_recipe("inheritune-mini", overrides | {"stages": stages}))
    assert found["num_steps"] == 40
    assert [stage["steps"] for stage in found["stages"]] == [30, 10]
    steps = [step for stage in found["stages"] for step, _ in stage["curve"]]
    assert steps == list(range(1, 41))
    rates = dict(pair for stage in found["stages"] for pair in stage["curve"])
    peak = found["stages"][0]["lr"]
    assert (rates[3], rates[30], rates[35], rates[40]) == (peak, peak, pytest.approx(peak / 2), 0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bytes_of_optimizer_and_checkpoint_are_those_that_training_has(name):
    model = tiny_model(tie_word_embeddings=False)
    optimizer = Optimizer(model, OptimizerSettings(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    config = model.config.to_dict()
    held = sum(tensor.nbytes for tensor in optimizer.tensors().values() if tensor.ndim)
    assert optimizer_bytes(config, name) == held
    weights = sum(p.nbytes for p in model.parameters())
    assert checkpoint_bytes(config, name, averages=1) == 2 * weights + held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_about_what_autograd_keeps(dtype):
    """Of the difference of two depths, so that head and embedding are not in it."""

    def kept(layers: int) -> int:
        model = tiny_model(num_hidden_layers=layers, **sizes)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.zeros(4, 128, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Objective(model, dtype)(ids, ids)
        found = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in weights)
        # In bf16 the weights are cast on the way: these copies are a part of their own.
        copies = sum(p.numel() * 2 for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
        return found - (copies if dtype == torch.bfloat16 else 0)

    sizes = {
        "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config = tiny_model(num_hidden_layers=1, **sizes).config.to_dict()
    request = MemoryRequest(128, 4, "bf16" if dtype == torch.bfloat16 else "fp32", "adamw", 0, "cpu")
    planned = training_memory(config, request)["activations"]
    assert planned == pytest.approx((kept(5) - kept(1)) / 4, rel=0.15)


@quick
@given(
    seq_len=st.integers(2, 4096), rows=st.integers(1, 64), precision=st.sampled_from(["fp32", "bf16"]),
    optimizer=st.sampled_from(["adamw", "muon"]), averages=st.integers(0, 2),
)  # fmt: skip
def test_memory_adds_up_and_grows_with_everything(seq_len, rows, precision, optimizer, averages):
    config = tiny_model().config.to_dict()

    def total(*changes) -> int:
        parts = training_memory(config, MemoryRequest(*changes))
        assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
        assert all(size >= 0 for size in parts.values())
        return parts["total"]

    base = total(seq_len, rows, precision, optimizer, averages, "cpu")
    if (precision, seq_len) != ("bf16", KEPT_LENGTH):  # of what is longer, attention's softmax is not kept
        assert total(seq_len + 1, rows, precision, optimizer, averages, "cpu") > base
    assert total(seq_len, rows + 1, precision, optimizer, averages, "cpu") > base
    assert total(seq_len, rows, precision, optimizer, averages + 1, "cpu") > base
    assert total(seq_len, rows, precision, "muon", averages, "cpu") <= total(
        seq_len, rows, precision, "adamw", averages, "cpu"
    )


def test_attentions_softmax_counts_where_it_is_kept():
    config = tiny_model().config.to_dict()

    def activations(*changes) -> int:
        return training_memory(config, MemoryRequest(*changes))["activations"]

    short, longer = ((length, 1, "bf16", "adamw", 0) for length in (KEPT_LENGTH, KEPT_LENGTH + 1))
    assert activations(*short, "cpu") > activations(*longer, "cpu")
    assert activations(*short, "cuda") < activations(*longer, "cuda")


def test_the_machine_is_found_and_gpus_are_known_by_a_word_of_their_name():
    assert this_machine().fp32_flops > 0
    assert gpu_by_name("NVIDIA H200") is GPUS["h200"]
    assert gpu_by_name("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_by_name("NVIDIA GeForce RTX 4090") is GPUS["rtx 4090"]
    assert gpu_by_name("NVIDIA A1000") is None
    assert gpu_by_name("NVIDIA A10G") is GPUS["a10g"]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H100 NVL", "h100 nvl"),
        ("NVIDIA H200 NVL", "h200 nvl"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),  # of the processor beside it
        ("NVIDIA RTX 6000 Ada Generation", "rtx 6000 ada"),
        ("NVIDIA RTX A6000", "rtx a6000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("Tesla T4", "t4"),
        ("rtx4090", "rtx 4090"),
        ("a6000", "rtx a6000"),
        ("4090", "rtx 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A40-8Q", None),
        ("l40s-48gb", "l40s"),  # a card by its own size has what the table says, not more
        ("t4-16gb", "t4"),
        ("b200-192gb", "b200"),
    ],
)
def test_a_card_is_not_taken_for_a_larger_one_of_its_name(name, entry):
    assert gpu_by_name(name) is (GPUS[entry] if entry else None)
    if entry:
        assert find_device(name) is GPUS[entry]
    else:
        with pytest.raises(UsageError, match="is not in the table"):
            find_device(name)


def test_there_are_cards_of_less_memory_and_without_bfloat16(recipe):
    small, large = (gpu_by_name(f"NVIDIA A100-SXM4-{size}GB") for size in (40, 80))
    assert small.memory_bytes == pytest.approx(large.memory_bytes / 2, rel=0.01)
    assert small.bf16_flops == large.bf16_flops
    assert plan_recipe(recipe, "a100-40gb", world=2)["layout"]["shards"] == 1
    assert plan_recipe(recipe, "a100-40gb")["memory_by_part"] == plan_recipe(recipe, "a100")["memory_by_part"]
    assert plan_recipe(recipe, "t4")["precision"] == "fp32"


def test_what_is_expected_not_to_fit_is_said_with_what_takes_less(recipe, tmp_path, monkeypatch, capsys):
    less = "train.micro_batch_size=auto, train.activation_checkpointing=selective (or full), or a smaller data.seq_len"
    command = ["plan", "scratch-tinyllama-1.1b", "--device", "rtx4090", "train.micro_batch_size=64"]
    assert cli.run(command) == 0
    assert f"warning: RTX 4090 has 23.6 GiB; less is taken with {less}\n" in capsys.readouterr().out
    assert less in cli.explain(torch.OutOfMemoryError("of memory"))[0]
    short = recipe.model_copy(update={"control": False, "train": recipe.train.model_copy(update={"steps": 1})})
    run_recipe(short, tmp_path / "fits")
    assert "is expected to take" not in capsys.readouterr().err
    monkeypatch.setattr(Runtime, "memory", lambda self: 2**20)
    run_recipe(short, tmp_path / "does-not")
    said = capsys.readouterr().err
    assert "of the 1 MiB that a device has" in said
    assert less in said


def test_sequences_longer_than_a_source_was_made_for_are_said_once(overrides, tmp_path, capsys):
    recipe = load_recipe("inheritune-mini", overrides | {"data.seq_len": 144, "train.global_batch_tokens": 144})
    for work in (plan_recipe, lambda recipe: open_inputs(recipe, tmp_path / "run")):
        work(recipe)
        assert capsys.readouterr().err.count("is longer than the 128 positions") == 1


def test_a_gpu_that_is_not_in_the_table_is_named(monkeypatch, capsys):
    for module in (devices, planning):
        monkeypatch.setattr(module, "driver_gpus", lambda: ["NVIDIA A1000"])
    assert find_device(None).kind == "cpu"
    assert "NVIDIA A1000 is not in the table of devices" in capsys.readouterr().err
    monkeypatch.setattr(devices, "driver_gpus", lambda: ["NVIDIA A1000", "NVIDIA A10"])
    assert find_device(None) is GPUS["a10"]
    assert not capsys.readouterr().err


def test_narrow_models_are_expected_to_reach_less_of_fast_products():
    machine = this_machine()
    shares = [machine.reached("bf16", width) for width in (64, 256, 575, 576, 4096)]
    assert shares == sorted(shares)
    assert shares[2] < shares[3] == shares[4] == machine.utilization
    assert shares[1] == pytest.approx(0.76 * shares[3], rel=0.01)
    assert machine.reached("fp32", 64) == machine.utilization
    assert GPUS["h200"].reached("bf16", 64) == GPUS["h200"].utilization


@quick
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300), st.integers(2, 100), st.integers(1, 12))
def test_a_curve_keeps_its_frame_and_is_never_higher_below_than_above(values, width, height):
    lines = draw(list(enumerate(values)), width, height)
    assert len(lines) == height
    assert all(len(line) <= width for line in lines)
    for above, below in itertools.pairwise(lines):
        for column, mark in enumerate(above.ljust(width)):
            assert mark == " " or below.ljust(width)[column] == "█"


def test_a_curve_shows_its_shape():
    assert draw([(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)], width=5, height=1) == [" ▂▄▆█"]


def test_planning_loads_no_torch_and_answers_within_seconds(overrides, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(overrides))
    others = ["shear-shootout-mini", "inheritune-grow-mini", "continual-sweep-mini", "scratch-tinyllama-1.1b-mini"]
    code = (
        "import json, sys, pathlib; from scionlm import api; "
        "found = api.plan('inheritune-mini', json.loads(pathlib.Path(sys.argv[1]).read_text())); "
        "assert found['num_steps'] == 10; "
        f"assert all(api.plan(name)['flops'] > 0 for name in {others}); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.json")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_calibration_measures_here(overrides):
    looked_up = api.plan("inheritune-mini", overrides)
    measured = api.plan("inheritune-mini", overrides, calibrate=True)
    assert measured["seconds_known_from"] != looked_up["seconds_known_from"]
    assert measured["seconds"] > 0
    assert measured["memory_measured_bytes"] > 0
    assert {key: measured[key] for key in ("flops", "num_tokens")} == {k: looked_up[k] for k in ("flops", "num_tokens")}
    with pytest.raises(UsageError, match="leave --device and --devices out"):
        api.plan("inheritune-mini", overrides, device="h100", calibrate=True)


def test_calibration_measures_every_size_that_is_trained_once(monkeypatch):
    seen = []

    def measured(part, ranks, target):
        seen.append((target["num_hidden_layers"], target["hidden_size"]))
        return calibrate.Speed([2.0] * len(part.resolved_stages), [0.0], None)

    monkeypatch.setattr(calibrate, "measure_steps", measured)
    found = calibrate.calibrated(load_recipe("inheritune-grow-mini"))
    assert sorted(layers for layers, _ in seen) == [1, 2, 3, 4, 5, 6, 6]  # the reference's batches are others
    for one in found["rounds"]:
        assert one["seconds"] == found["seconds_by_part"][one["name"]] == pytest.approx(2 * one["num_tokens"] / 1024)
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_part"].values()))
    assert "tokens_per_s" not in found  # of which of them
    seen.clear()
    found = calibrate.calibrated(load_recipe("shear-mini"))
    assert seen == [(24, 384), (30, 576)]
    assert list(found["seconds_by_part"]) == ["pruning", "recovery", "control", "evaluation"]


def test_masks_are_calibrated_here(tiny_folder, data_folder):
    target = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
              "num_key_value_heads": 1}  # fmt: skip
    settings = {"source": str(tiny_folder), "data.dir": str(data_folder.path), "data.seq_len": 16, "target": target,
                "prune": {"method": "masks", "steps": 2}, "train.steps": 3, "train.global_batch_tokens": 32,
                "train.micro_batch_size": 2, "train.compile": False}  # fmt: skip
    found = api.plan("shear", settings, calibrate=True)
    assert list(found["seconds_by_part"]) == ["pruning", "recovery", "evaluation"]
    assert all(seconds > 0 for seconds in found["seconds_by_part"].values())


def test_rounds_and_a_reference_are_planned_one_after_another():
    found = plan_recipe(load_recipe("inheritune-grow-mini"), "h100")
    names = [one["name"] for one in found["rounds"]]
    assert names == ["reference", *(f"round {n} ({n} layers)" for n in range(1, 7)), "control"]
    for key in ("num_tokens", "flops"):  # the control aside, as where one model is trained
        assert found[key] == sum(one[key] for one in found["rounds"][:-1])
    assert found["seconds"] == pytest.approx(sum(found["seconds_by_part"].values()))
    assert found["num_parameters"] == found["rounds"][0]["num_parameters"]  # all layers are the reference's own
    student = plan_recipe(load_recipe("inheritune-grow-mini", ["grow.from=student"]), "h100")
    assert student["rounds"][-1]["num_tokens"] == 6 * found["rounds"][-1]["num_tokens"]  # all that its weights see


LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def test_pruning_and_recovery_lie_in_the_one_layout_that_a_run_has(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    recipe = load_recipe("shear-llama2-7b-1.3b", [f"source={tmp_path}"])
    found = plan_recipe(recipe, "h100", world=8)
    devices = Devices("cuda", "bf16", GPUS["h100"].memory_bytes, 8, 8)
    source = open_folder(tmp_path)
    settled = with_target(recipe, source)
    pruning, recovery = trainings_of(settled, source.config, plan_of(settled, source), None)
    assert [one.layout(devices).name for one in (pruning, recovery)] == ["fsdp", "ddp"]  # each by itself
    assert found["layout"]["name"] == "fsdp"
    assert found["layout"]["shards"] == 8
    whole = count_parameters(LLAMA_7B)["total"]
    assert found["checkpoint_bytes"] == 12 * whole  # the pruning's, float32 with two moments
    rows = shared_layout([pruning, recovery], devices)[1][-1]
    assert found["memory_bytes_per_device"] == max(
        pruning.memory(devices, 8)["total"], recovery.memory(devices, 8, rows)["total"]
    )


@pytest.mark.parametrize(("how", "longer"), [("selective", 1.16), ("full", 4 / 3)])
def test_what_is_made_again_on_the_way_back_takes_time(recipe, how, longer):
    train = recipe.train.model_copy(update={"activation_checkpointing": how})
    once, again = (plan_recipe(one, "h100") for one in (recipe, recipe.model_copy(update={"train": train})))
    assert again["flops"] == once["flops"]
    assert again["seconds_by_part"]["training"] == pytest.approx(longer * once["seconds_by_part"]["training"])
    assert again["seconds_by_part"]["evaluation"] == once["seconds_by_part"]["evaluation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grow.max_layers=9", "the source has 6 layers"),
        ("grow.max_tokens=1k", "one round takes"),
        ("reference.train.time=1 min", "its lengths are steps"),
    ],
)
def test_rounds_that_cannot_be_are_no_plan(change, message):
    with pytest.raises(UsageError, match=message):
        plan_recipe(load_recipe("inheritune-grow-mini", [change]))
