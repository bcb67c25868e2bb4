"""Several ranks train what one process trains: the same samples, the same losses, whatever a run is made of."""

import random
import zlib
from pathlib import Path

import pytest
import torch

from features import FEATURES, SCHEDULES
from scionlm.core.config import dump_yaml
from scionlm.core.errors import StoppedError
from scionlm.core.records import read_json
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.train.checkpoint import find_damage, open_checkpoint
from whole_runs import SEQ_LEN, SETTINGS, Watch, consumed_of, differing, metrics_of, outcome, quicken
from worlds import World

FP32, BF16 = 1e-5, 1e-3
# Of these both layouts have something of their own; of the others one is enough.
BOTH = (
    "plain", "odd micro-batches", "document mask and best fit", "muon and ema", "scales", "reweight",
    "bf16, muon, accumulation", "distill from a wider teacher", "distill in stages with a control",
)  # fmt: skip
# Settled by the order of samples or the schedule, before there is any rank: tests/data and tests/schedules have it.
BEFORE_RANKS = (
    "ramp", "temperature", "exhausted", "replay from", "replay reshuffled", "proxy", "stages that replay by",
    *(f"schedule {name}" for name in SCHEDULES if name != "infinite"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder, and the watch, of a run by one process; the same recipe is run once."""
    root, runs = tmp_path_factory.mktemp("alone"), {}

    def alone(recipe):
        key = dump_yaml(recipe.model_dump(mode="json"))
        if key not in runs:
            with pytest.MonkeyPatch.context() as patch:
                watch = Watch(patch)
                run_recipe(recipe, root / str(len(runs)))
            runs[key] = root / str(len(runs)), watch
        return runs[key]

    return alone


@pytest.fixture(scope="module")
def together(tmp_path_factory, pair):
    """Return the folder of a run by two ranks that nothing disturbs, and what they say; the same recipe is run once."""
    root, runs = tmp_path_factory.mktemp("together"), {}

    def together(recipe):
        key = dump_yaml(recipe.model_dump(mode="json"))
        if key not in runs:
            out = root / str(len(runs))
            runs[key] = out, pair.run(recipe, out)
        return runs[key]

    return together


def numbers_of(value, path=""):
    """Yield every number in a record, by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_of(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers_of(inner, f"{path}/{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def close(mine: Path, theirs: Path, tolerance: float) -> None:
    """Check that two runs have the same metrics and results: losses within a relative tolerance, norms within ten."""
    found, wanted = metrics_of(mine), metrics_of(theirs)
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    result = [read_json(out / "result.json")["domains"] for out in (mine, theirs)]
    for (path, value), (_, true) in zip(numbers_of([found, result[0]]), numbers_of([wanted, result[1]]), strict=True):
        if path.endswith("perplexity"):  # the loss again, exponentiated
            continue
        loose = 10 if path.endswith("grad_norm") or "ratio" in path or "divergence" in path else 1
        assert value == pytest.approx(true, rel=loose * tolerance, abs=1e-7), path


def same_samples(answers, watch) -> None:
    """Check that every rank went through the samples of one process, and that together they saw each of them once."""
    for answer in answers:
        assert answer["samples"] == [[list(sample) for sample in step] for step in watch.samples]
    for step, rows in enumerate(watch.rows()):
        shown = [row for answer in answers for row in answer["rows"][step]]
        assert {row.hex() for row in rows} <= set(shown)
        assert len(shown) == len(answers) * -(-len(rows) // len(answers))


def tolerance_of(feature: str) -> float:
    """Return what a feature allows: Muon makes its updates in bfloat16, whatever the run computes in."""
    return BF16 if "bf16" in str(FEATURES[feature]) or "muon" in str(FEATURES[feature]) else FP32


def has_dropout(feature: str) -> bool:
    return "GPT2" in str(FEATURES[feature])


def cases(features, both=BOTH):
    """Return feature and layout: both of some features, one of the others."""
    layouts = ("ddp", "fsdp")
    return [
        pytest.param(name, layout, marks=[pytest.mark.slow] if name.startswith(BEFORE_RANKS) else [])
        for name in features
        for layout in (layouts if name in both else [layouts[zlib.crc32(name.encode()) % 2]])
    ]


@pytest.mark.parametrize(("feature", "layout"), cases(name for name in FEATURES if not has_dropout(name)))
def test_two_ranks_train_what_one_process_trains(feature, layout, make, alone, pair, tmp_path):
    out, watch = alone(make(feature))
    recipe = make(feature, train__parallel=layout)
    answers = pair.run(recipe, tmp_path / "run")
    assert [answer["error"] for answer in answers] == [None, None]
    close(tmp_path / "run", out, tolerance_of(feature))
    same_samples(answers, watch)
    assert consumed_of(tmp_path / "run", recipe) == consumed_of(out, recipe)
    assert read_json(tmp_path / "run" / "training.json")["layout"] == layout


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_go_on_with_a_model_as_one_process_does(layout, alone, pair, earlier, data_folder, tmp_path):
    """With replay, an average with the first weights, and five sequences a step, which do not come out even."""
    given = {key: value for key, value in SETTINGS.items() if not key.startswith("inherit")} | {
        "data.dir": str(data_folder.path), "data.mixture": {"beta": 1.0}, "branch.run": str(earlier),
        "replay": {"run": str(earlier), "fraction": 0.3}, "average": {"method": "start", "share": 0.3},
        "train.global_batch_tokens": SEQ_LEN * 5,
    }  # fmt: skip
    recipe = load_recipe("continual", given)
    out, watch = alone(recipe)
    answers = pair.run(load_recipe("continual", given | {"train.parallel": layout}), tmp_path / "run")
    assert [answer["error"] for answer in answers] == [None, None]
    close(tmp_path / "run", out, FP32)
    same_samples(answers, watch)
    assert consumed_of(tmp_path / "run", recipe) == consumed_of(out, recipe)
    mine, theirs = (read_json(folder / "result.json")["forgetting"] for folder in (tmp_path / "run", out))
    assert dict(numbers_of(mine)) == pytest.approx(dict(numbers_of(theirs)), rel=FP32, abs=10 * FP32)
    assert mine["upstream"]["forgetting"] != 0


@pytest.mark.parametrize(
    ("feature", "layout"),
    cases(
        ["ema", "muon", "reweight", "dropout", "distill from a wider teacher", "stages that replay"],
        both=("muon", "distill from a wider teacher"),
    ),
)
def test_two_ranks_stopped_and_gone_on_with_are_never_stopped(feature, layout, make, pair, together, tmp_path):
    recipe = make(feature, train__parallel=layout)
    steps = recipe.total_steps
    out, whole = together(recipe)
    first, second = sorted(random.Random(zlib.crc32(feature.encode())).sample(range(1, steps), 2))
    stopped = pair.run(recipe, tmp_path / "parts", stop_at=first, only=1)
    assert {answer["error"] for answer in stopped} == {"StoppedError"}
    assert [answer["told"] for answer in stopped] == [False, True], "the main rank says it"
    assert read_json(tmp_path / "parts" / "status.json")["exit_code"] == 75
    again = pair.run(recipe, tmp_path / "parts", stop_at=second - first, only=0)
    assert {answer["error"] for answer in again} == {"StoppedError"}
    last = pair.run(recipe, tmp_path / "parts")
    assert [answer["error"] for answer in last] == [None, None]
    assert differing(outcome(out, recipe), outcome(tmp_path / "parts", recipe)) == set()
    for rank in (0, 1):
        assert whole[rank]["rows"] == stopped[rank]["rows"] + again[rank]["rows"] + last[rank]["rows"]


@pytest.mark.parametrize(
    ("feature", "layout"),
    cases(
        ["plain", "bf16", "muon and ema", "distill from a wider teacher", "reweight"],
        both=("muon and ema", "distill from a wider teacher"),
    ),
)
def test_from_two_ranks_to_one_and_back_is_one_process(feature, layout, make, alone, pair, tmp_path):
    """R5: the checkpoint of any number of ranks is one of any other."""
    out, watch = alone(make(feature))
    recipe = make(feature, train__parallel=layout)
    rows = []
    for stop_at, world in ((3, 2), (3, 1), (None, 2)):
        if world == 2:
            answers = pair.run(recipe, tmp_path / "run", stop_at=stop_at)
            assert {answer["error"] for answer in answers} == {"StoppedError" if stop_at else None}
            rows += [sorted(a + b) for a, b in zip(answers[0]["rows"], answers[1]["rows"], strict=True)]
        else:
            with pytest.MonkeyPatch.context() as patch:
                mine = Watch(patch, [stop_at])
                with pytest.raises(StoppedError):
                    run_recipe(recipe, tmp_path / "run")
            rows += [sorted(row.hex() for row in step) for step in mine.rows()]
    assert rows == [sorted(row.hex() for row in step) for step in watch.rows()]
    close(tmp_path / "run", out, tolerance_of(feature))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_checkpoints_in_the_background_are_those_of_the_foreground(layout, make, pair, tmp_path):
    changes = {"train__parallel": layout, "checkpoint__every": 2, "checkpoint__keep": 9}
    for name, background in (("front", False), ("back", True)):
        recipe = make("ema", checkpoint__background=background, **changes)
        assert [answer["error"] for answer in pair.run(recipe, tmp_path / name)] == [None, None]
    front, back = ({path.name: path for path in (tmp_path / n / "checkpoints").iterdir()} for n in ("front", "back"))
    assert {"step-00000008"} < set(back) <= set(front)  # one that is due while another is written waits for it
    for name, path in back.items():
        assert not find_damage(path)
        for group in ("weights", "optimizer", "average"):
            mine, theirs = (open_checkpoint(place).tensors(group) for place in (path, front[name]))
            assert mine.keys() == theirs.keys() != set()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize(
    ("harm", "background"),
    [("full_while_writing", False), ("full_while_flushing", False), ("full_while_flushing", True)],
)
def test_a_disk_that_is_full_for_one_rank_is_waited_out_by_all(harm, background, only, make, pair, together, tmp_path):
    recipe = make(train__parallel="fsdp", checkpoint__every=2, checkpoint__background=background)
    answers = pair.run(recipe, tmp_path / "run", harm=harm, only=only)
    assert [answer["error"] for answer in answers] == [None, None]
    assert [answer["harmed"] > 0 for answer in answers] == [only == 0, only == 1]
    if not background:  # then which are written depends on the clock
        assert differing(outcome(together(recipe)[0], recipe), outcome(tmp_path / "run", recipe)) == set()


@pytest.mark.parametrize("only", [0, 1])
def test_a_disk_that_stays_full_for_one_rank_ends_all_with_the_same_error(only, make, pair, tmp_path):
    recipe = make(train__parallel="fsdp", checkpoint__every=2)
    answers = pair.run(recipe, tmp_path / "run", harm="full", only=only)
    assert [answer["error"] for answer in answers] == ["StorageError"] * 2
    assert answers[0]["message"] == answers[1]["message"]
    assert "the disk is full" in answers[0]["message"]
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 74)


@pytest.mark.parametrize("harm", ["flip", "missing", "extra", "cut"])
def test_a_damaged_share_is_found_and_the_checkpoint_before_it_taken(harm, make, pair, together, tmp_path):
    recipe = make(train__parallel="fsdp", checkpoint__every=2)
    pair.run(recipe, tmp_path / "run", stop_at=5)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    share = sorted((newest / "shards").iterdir())[1]
    content = bytearray(share.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 4
        share.write_bytes(bytes(content))
    elif harm == "cut":
        share.write_bytes(bytes(content[:-5]))
    elif harm == "missing":
        share.unlink()
    else:
        (newest / "shards" / "shard-00003-model-00001-of-00001.safetensors").write_bytes(bytes(content))
    assert find_damage(newest)
    assert [answer["error"] for answer in pair.run(recipe, tmp_path / "run")] == [None, None]
    assert newest.with_name(f"damaged-{newest.name}").exists()
    assert differing(outcome(together(recipe)[0], recipe), outcome(tmp_path / "run", recipe)) == set()


def test_a_request_that_is_wrong_is_refused_by_all_and_leaves_nothing(make, pair, tmp_path):
    answers = pair.run(make(inherit__layers=99), tmp_path / "run")
    assert {answer["error"] for answer in answers} == {"UsageError"}
    assert len({answer["message"] for answer in answers}) == 1
    assert not (tmp_path / "run").exists()
    answers = pair.run(make(train__parallel="hsdp"), tmp_path / "run")
    assert {answer["error"] for answer in answers} == {"UsageError"}
    assert "needs several machines" in answers[1]["message"]


def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_by_all(make, pair, tmp_path):
    answers = pair.run(make(train__parallel="fsdp"), tmp_path / "run", harm="not_finite")
    assert [answer["error"] for answer in answers] == [None, None]
    assert [answer["harmed"] for answer in answers] == [0, 1]
    assert read_json(tmp_path / "run" / "training.json")["skipped_updates"] == 1


def test_a_text_that_ends_on_one_rank_alone_keeps_no_other_waiting(make, pair, tmp_path):
    recipe = make(train__parallel="fsdp", train__steps=1)
    answers = pair.run(recipe, tmp_path / "run", harm="ends_early")
    assert [answer["error"] for answer in answers] == [None, None]
    texts = [sample["texts"]["child"] for sample in read_json(tmp_path / "run" / "result.json")["samples"]]
    assert all(texts), "the main rank's texts are those that are shown"


@pytest.mark.parametrize(
    ("harm", "kind", "code", "words"),
    [
        ("broken_data", "DataError", 65, "rank 1: what it reads is broken"),
        ("fault", "ScionError", 1, "rank 1: KeyError: 'alpha'"),
    ],
)
def test_what_a_rank_fails_with_by_itself_is_said_by_it_and_by_the_main_one(
    harm, kind, code, words, make, pair, tmp_path
):
    answers = pair.run(make(train__parallel="fsdp"), tmp_path / "run", harm=harm)
    assert [(answer["error"], answer["message"], answer["told"]) for answer in answers] == [(kind, words, False)] * 2
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", code, words)


def test_the_main_rank_decides_how_domains_are_weighed(make, alone, pair, tmp_path):
    out, watch = alone(make("reweight", control=True))
    answers = pair.run(make("reweight", control=True, train__parallel="ddp"), tmp_path / "run", harm="own_opinion")
    assert [answer["error"] for answer in answers] == [None, None]
    assert answers[1]["harmed"] > 0
    close(tmp_path / "run", out, FP32)
    same_samples(answers, watch)


def test_a_finished_run_is_left_alone(make, pair, tmp_path):
    recipe = make(train__parallel="ddp")
    pair.run(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    answers = pair.run(recipe, tmp_path / "run")
    assert [(answer["error"], answer["rows"]) for answer in answers] == [(None, []), (None, [])]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_copies_of_shared_weights_on_two_machines(make, alone, tmp_path):
    """HSDP: 4 ranks, 2 a machine; 6 sequences a step do not come out even."""
    changes = {"train__global_batch_tokens": SEQ_LEN * 6, "optimizer__name": "muon", "average": {"decay": 0.8}}
    out, _ = alone(make(**changes))
    recipe = make(train__parallel="hsdp", checkpoint__every=3, **changes)
    with World(4, per_node=2) as world:
        answers = world.run(recipe, tmp_path / "run", stop_at=4, only=2)
        assert {answer["error"] for answer in answers} == {"StoppedError"}
        assert [answer["error"] for answer in world.run(recipe, tmp_path / "run")] == [None] * 4
    close(tmp_path / "run", out, BF16)
    assert consumed_of(tmp_path / "run", recipe) == consumed_of(out, recipe)
    assert read_json(tmp_path / "run" / "training.json")["layout"] == "hsdp"
    assert read_json(tmp_path / "run" / "manifest.json")["device"]["world"] == 4
