"""The streaming writer: files that every reader opens, hashed as they are, complete or absent."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scionlm.cli.main import run
from scionlm.core import log
from scionlm.core.errors import ScionError, StorageError
from scionlm.core.files import sha256_file
from scionlm.core.tensors import read_header
from scionlm.recipes.inherit import inherit_folder
from scionlm.sources import tensor_index
from scionlm.surgery import surgery as surgery_module
from scionlm.surgery import write as write_module
from scionlm.surgery.write import INDEX, Tensor, write_weights

quick = settings(max_examples=40)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensor(name: str, value: torch.Tensor, rows: int = 3) -> Tensor:
    """Return a tensor to write that comes in blocks of a few rows."""
    return Tensor(name, value.dtype, tuple(value.shape), lambda: iter(value.split(rows) if len(value) else [value]))


def write(folder: Path, values: dict[str, torch.Tensor], shard_bytes: int = 10**9):
    folder.mkdir(parents=True, exist_ok=True)
    return write_weights([tensor(name, value) for name, value in values.items()], folder, shard_bytes)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & found.keys()
        found |= part
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t):
        return t.contiguous().view(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


@quick
@given(
    st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=8),
    st.sampled_from([1, 7, 64, 300, 10**9]),
)
def test_the_library_reads_back_every_name_shape_and_type_from_shards_of_every_size(tmp_path_factory, what, size):
    """Types mixed in one file, one element, none at all, names in any script."""
    folder = tmp_path_factory.mktemp("w")
    values = {name: numbers(i, *kind) for i, (name, kind) in enumerate(what.items())}
    written = write(folder, values, size)
    assert same(read_all(folder), values)
    assert written.files == {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
    assert written.not_finite == []
    assert {name: (entry.shape) for name, (_, entry) in tensor_index(folder).items()} == {
        name: tuple(value.shape) for name, value in values.items()
    }


def test_every_tensor_starts_at_a_multiple_of_its_size_and_the_data_at_eight(tmp_path):
    values = {f"t{i}": numbers(i, (i + 1,), DTYPES[i % 4]) for i in range(9)}
    write(tmp_path, values)
    for name, entry in read_header(tmp_path / "model.safetensors", "")[0].items():
        assert entry.start % values[name].dtype.itemsize == 0
    assert (8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")) % 8 == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_no_more_than_they_may_unless_one_tensor_does(tmp_path):
    values = {f"t{i}": numbers(i, (size,), torch.float32) for i, size in enumerate((10, 10, 10, 50, 5, 5, 10))}
    write(tmp_path, values, 100)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values()) == 400
    for file in files:
        held = [name for name, own in index["weight_map"].items() if own == file]
        assert set(load_file(tmp_path / file)) == set(held)
        assert sum(values[name].nbytes for name in held) <= 100 or len(held) == 1


def test_one_file_has_no_index(tmp_path):
    write(tmp_path, {"a": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_blocks_come_in_another_type_and_not_contiguous_and_are_written_in_the_type_promised(tmp_path):
    value = torch.randn(6, 4)
    promised = Tensor("a", torch.bfloat16, (4, 6), lambda: iter([value.t()[:2], value.t()[2:]]))
    write_weights([promised], tmp_path, 10**9)
    assert same(read_all(tmp_path), {"a": value.t().to(torch.bfloat16)})


@pytest.mark.parametrize("rows", [2, 4])
def test_a_tensor_that_comes_in_another_size_than_promised_is_an_error_that_names_it(tmp_path, rows):
    wrong = Tensor("layers.7.odd", torch.float32, (3, 5), lambda: iter([torch.zeros(rows, 5)]))
    with pytest.raises(ScionError, match=r"'layers\.7\.odd'"):
        write_weights([wrong], tmp_path, 10**9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_are_named_once_and_written_as_they_are(tmp_path, value, dtype):
    odd = torch.zeros(9, 2, dtype=dtype)
    odd[0, 0] = odd[8, 1] = value
    values = {"good": torch.full((4,), torch.finfo(dtype).max, dtype=dtype), "odd": odd, "none": torch.zeros(0)}
    written = write(tmp_path, values)
    assert written.not_finite == ["odd"]
    assert same(read_all(tmp_path), values)


# From the whole command.


def test_the_provenance_states_the_hash_of_every_file_of_weights(llama, tmp_path):
    out = tmp_path / "out"
    facts = inherit_folder(str(llama.path), out, {"layers": 3}, True, 20_000)
    stated = json.loads((out / "provenance.json").read_text())["sha256"]
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}
    assert stated == files == facts["files"]
    assert len(files) > 3
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == set(files)


def test_transformers_opens_the_shards_without_a_word(llama, tmp_path):
    out = tmp_path / "out"
    inherit_folder(str(llama.path), out, {"layers": 3}, True, 20_000)
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def in_a_child(prepare, arguments: list[str], folder: Path) -> int:
    """Start `scion` in a process of its own, without the seconds of imports; return its number."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        with (folder.parent / "stderr").open("w") as sys.stderr:
            prepare()
            code = run(arguments)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("limit", [0, 5, 3000, 40_000, 10**9])
def test_a_disk_that_is_full_at_any_point_leaves_nothing_and_is_the_code_of_the_disk(llama, tmp_path, limit):
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond it. The largest limit is the control."""
    folder = tmp_path / "room"
    folder.mkdir()
    arguments = ["inherit", str(llama.path), "--layers", "3", "-o", str(folder / "made" / "out")]
    code = exit_code(in_a_child(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), arguments, folder))
    if limit == 10**9:
        assert code == 0
        assert (folder / "made" / "out" / "provenance.json").exists()
    else:
        assert code == 74
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("at", ["write", "fsync", "rename", "chmod"])
def test_a_fault_of_the_disk_in_any_call_leaves_nothing(llama, tmp_path, monkeypatch, at):
    out = tmp_path / "made" / "out"
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise OSError(5, "Input/output error")

    if at == "write":
        monkeypatch.setattr("scionlm.surgery.write._bytes_of", fail)
    elif at == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, at, fail)
    with pytest.raises(StorageError) as caught:
        inherit_folder(str(llama.path), out, {"layers": 3}, True, 20_000)
    assert caught.value.exit_code == 74
    assert calls
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_in_the_middle_of_the_weights_leaves_no_result(llama, tmp_path, kind):
    folder = tmp_path / "room"
    folder.mkdir()

    def slowly():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are born deaf to it
        real = write_module._bytes_of

        def slow(block):
            (tmp_path / "writing").touch()
            time.sleep(0.3)
            return real(block)

        write_module._bytes_of = slow

    arguments = ["inherit", str(llama.path), "--layers", "3", "-o", str(folder / "out")]
    child = in_a_child(slowly, arguments, folder)
    deadline = time.monotonic() + 60
    while not (tmp_path / "writing").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.4)
    os.kill(child, kind)
    assert exit_code(child) == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[kind]
    assert not (folder / "out").exists()
    # After SIGKILL a hidden folder may stay, never the result.
    assert all(path.name.startswith(".") for path in folder.iterdir())
    assert kind == signal.SIGKILL or list(folder.iterdir()) == []


def test_the_files_get_the_permissions_that_the_umask_asks_for(llama, tmp_path):
    before = os.umask(0o027)
    try:
        inherit_folder(str(llama.path), tmp_path / "out", {"layers": 3}, True, 20_000)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from scionlm.recipes import inherit
from scionlm.surgery import probe, surgery, verify
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
inherit.inherit_folder(sys.argv[1], Path(sys.argv[2]), {"layers": 3, "hidden_size": 768}, False, 0)
print(before, peak())
"""


def test_memory_stays_at_a_few_tensors_whatever_the_size_of_the_model(tmp_path):
    """A model of 0.27 GB is cut with less than three of its largest tensors (33 MB) and 100 MB on top of imports."""
    from transformers import AutoConfig

    from scionlm.families.shape import expected_tensors

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = AutoConfig.for_model(
        "llama", **sizes, vocab_size=16000, tie_word_embeddings=False, dtype="float32", head_dim=64
    )
    source = tmp_path / "source"
    source.mkdir()
    config.save_pretrained(source)
    plain = json.loads((source / "config.json").read_text())
    block = torch.randn(2**20).to(torch.bfloat16)

    def blocks(number):
        return lambda: (block[: min(2**20, number - at)] for at in range(0, number, 2**20))

    places = list(expected_tensors(plain))
    write_weights(
        [Tensor(p.name, torch.bfloat16, p.shape, blocks(torch.Size(p.shape).numel())) for p in places], source, 10**9
    )
    assert (source / "model.safetensors").stat().st_size > 2.5e8
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    largest = max(torch.Size(p.shape).numel() for p in places) * 2 / 2**20
    assert after - before < 3 * largest + 100, (before, after, largest)


def test_progress_is_that_of_all_blocks(tmp_path, tiny_folder, monkeypatch):
    told = []

    class Seen(log.Progress):
        def update(self, done, detail=""):
            told.append((done, self._total))

    monkeypatch.setattr(surgery_module, "Progress", Seen)
    inherit_folder(str(tiny_folder), tmp_path / "out", {"layers": 2}, False, 20_000)
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
