"""Reading tensors piece by piece: the same bytes as the library reads, and nothing believed."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from scionlm.core.errors import DataError, StorageError
from scionlm.sources import tensor_index
from scionlm.sources.tensors import DTYPES, FolderTensors

quick = settings(max_examples=40)


def folder_of(path: Path, values: dict[str, torch.Tensor], files: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(values, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {}
    for number in range(files):
        part = dict(list(values.items())[number::files])
        save_file(part, path / f"model-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def raw_file(path: Path, dtype: str, shape: list[int], data: bytes, name: str = "a") -> None:
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@quick
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(list(DTYPES.values()))),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3),
    st.data(),
)
def test_any_rows_of_any_tensor_are_those_that_were_written(tmp_path_factory, kinds, files, data):
    values = {f"layer.{i}": torch.randn(*shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)}
    with FolderTensors(folder_of(tmp_path_factory.mktemp("t"), values, min(files, len(values)))) as tensors:
        assert set(tensors.names()) == set(values)
        for name, value in values.items():
            start = data.draw(st.integers(0, len(value)))
            stop = data.draw(st.integers(start, len(value)))
            found = tensors.rows(name, start, stop)
            assert (found.dtype, tuple(found.shape)) == (value.dtype, (stop - start, *value.shape[1:]))
            assert torch.equal(found, value[start:stop])
            assert (tensors.dtype(name), tensors.shape(name)) == (value.dtype, tuple(value.shape))


def test_what_was_read_is_memory_of_its_own(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.ones(4, 3)})
    with FolderTensors(folder) as tensors:
        first, second = tensors.rows("a", 0, 4), tensors.rows("a", 0, 4)
        first.zero_()
        assert torch.equal(second, torch.ones(4, 3))
        (folder / "model.safetensors").unlink()  # opened before
        assert torch.equal(tensors.rows("a", 1, 2), torch.ones(1, 3))
    assert torch.equal(second, torch.ones(4, 3))


def test_files_are_closed_at_the_end(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with FolderTensors(folder_of(tmp_path, {f"t{i}": torch.ones(2) for i in range(4)}, 4)) as tensors:
        for name in tensors.names():
            tensors.rows(name, 0, 1)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 4
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("dtype", ["I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_a_type_that_is_no_weight_is_refused_by_name_when_it_is_asked_for(tmp_path, dtype):
    size = 8 if dtype == "I64" else 1
    raw_file(tmp_path / "model.safetensors", dtype, [3], bytes(3 * size), "layers.0.odd")
    with FolderTensors(tmp_path) as tensors:
        assert tensors.shape("layers.0.odd") == (3,)  # looking does no harm: it may be a constant that nobody needs
        for ask in (lambda: tensors.dtype("layers.0.odd"), lambda: tensors.rows("layers.0.odd", 0, 1)):
            with pytest.raises(DataError, match=rf"'layers\.0\.odd' is stored as {dtype}.*floating-point"):
                ask()


@pytest.mark.parametrize("dtype", ["F4", "C64", "F8_E8M0", "F99", "", None, 3])
def test_a_type_that_nobody_knows_is_a_data_error_that_names_the_tensor(tmp_path, dtype):
    raw_file(tmp_path / "model.safetensors", dtype, [4], bytes(4), "layers.0.odd")
    with pytest.raises(DataError, match=r"model\.safetensors: tensor 'layers\.0\.odd'"):
        tensor_index(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_is_a_data_error_that_names_the_tensor(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)})
    with FolderTensors(folder) as tensors:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 8)
        assert torch.equal(tensors.rows("a", 0, 100), torch.ones(100))
        with pytest.raises(DataError, match=r"ended inside tensor 'b'; fetch it again"):
            tensors.rows("b", 0, 100)


def test_a_file_that_vanishes_is_a_storage_error(tmp_path):
    folder = folder_of(tmp_path, {"a": torch.ones(4)})
    with FolderTensors(folder) as tensors:
        (folder / "model.safetensors").unlink()
        with pytest.raises(StorageError) as caught:
            tensors.rows("a", 0, 1)
    assert caught.value.exit_code == 74


def test_a_part_of_the_files_is_looked_at_alone(tmp_path):
    values = {f"t{i}": torch.full((2,), float(i)) for i in range(4)}
    folder = folder_of(tmp_path, values, 2)
    (folder / "model-1.safetensors").unlink()
    found = tensor_index(folder, [folder / "model-0.safetensors"])
    assert set(found) == {"t0", "t2"}
    with FolderTensors(folder, found) as tensors:
        assert torch.equal(tensors.rows("t2", 0, 2), values["t2"])
    with pytest.raises(DataError, match=r"names model-1\.safetensors, which is not in the folder"):
        tensor_index(folder)


def test_a_promise_of_the_part_that_is_looked_at_is_checked(tmp_path):
    folder = folder_of(tmp_path, {f"t{i}": torch.ones(2) for i in range(4)}, 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "model-0.safetensors"}}))
    with pytest.raises(DataError, match=r"promises tensor 'ghost' in model-0\.safetensors"):
        tensor_index(folder, [folder / "model-0.safetensors"])
    assert set(tensor_index(folder, [folder / "model-1.safetensors"])) == {"t1", "t3"}
