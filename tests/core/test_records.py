"""Versioned JSON and JSONL."""

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, StorageError
from scionlm.core.records import FORMAT_VERSION, JsonlWriter, read_json, read_jsonl, write_json

quick = settings(max_examples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def metrics(path: Path, steps: int = 3) -> Path:
    writer = JsonlWriter(path, "metrics")
    for step in range(1, steps + 1):
        writer.write({"step": step, "train/nll": step / 7})
    writer.close()
    return path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(record=st.dictionaries(st.text(max_size=8).filter(lambda key: key != "format_version"), values, max_size=5))
def test_a_record_comes_back_as_it_was_written(folder, record):
    write_json(folder / "r.json", record)
    assert read_json(folder / "r.json") == {"format_version": FORMAT_VERSION} | record


def test_a_name_that_is_not_unicode_comes_back(tmp_path):
    """A file name with a byte outside UTF-8 reaches Python as a lone surrogate, and manifests hold file names."""
    write_json(tmp_path / "r.json", {"name": "caf\udce9.txt"})
    assert read_json(tmp_path / "r.json")["name"] == "caf\udce9.txt"


def test_the_format_version_stands_first(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    assert next(iter(json.loads((tmp_path / "r.json").read_text()))) == "format_version"


def test_a_newer_format_version_is_refused_by_name(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(DataError, match=r"r\.json has format_version 2, this Scion reads up to 1; install a newer"):
        read_json(path)


@pytest.mark.parametrize(
    "content",
    ["{", "", "[]", "5", '{"a": 1}', '{"format_version": "1"}', '{"format_version": null}', "[" * 100_000, "\udcff"],
    ids=lambda text: text[:20],
)
def test_what_is_not_a_record_is_a_data_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=r"r\.json") as caught:
        read_json(path)
    assert caught.value.exit_code == 65


def test_an_absent_record_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        read_json(tmp_path / "r.json")
    with pytest.raises(DataError, match="is missing"):
        read_jsonl(tmp_path / "r.jsonl")


def test_lines_come_back_in_order_without_the_header(tmp_path):
    assert [record["step"] for record in read_jsonl(metrics(tmp_path / "m.jsonl"))] == [1, 2, 3]


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path):
    path = metrics(tmp_path / "m.jsonl")
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_a_broken_inner_line_is_refused_with_its_number(tmp_path):
    path = metrics(tmp_path / "m.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
    with pytest.raises(DataError, match=r"m\.jsonl, line 3 is not valid JSON"):
        read_jsonl(path)


def test_a_file_of_lines_needs_a_header_of_a_known_version(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="no header"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="no format_version"):
        read_jsonl(path)
    path.write_text('{"format_version": 2}\n')
    with pytest.raises(DataError, match="format_version 2"):
        read_jsonl(path)


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl", "metrics")
    assert read_jsonl(tmp_path / "m.jsonl") == []
    writer.write({"step": 1})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    writer.close()


def test_a_writer_goes_on_after_the_lines_that_are_there(tmp_path):
    path = metrics(tmp_path / "m.jsonl")
    writer = JsonlWriter(path, "metrics")
    writer.write({"step": 4})
    writer.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3, 4]


def test_a_writer_that_goes_on_after_a_torn_line_makes_a_readable_file(tmp_path):
    path = metrics(tmp_path / "m.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    writer = JsonlWriter(path, "metrics")
    writer.write({"step": 3})
    writer.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3]


def test_not_a_number_and_infinity_are_written_as_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl", "metrics")
    writer.write({"a": float("nan"), "b": float("inf"), "c": 1.5})
    writer.close()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"a": None, "b": None, "c": 1.5}]


def test_not_a_number_inside_a_value_is_written_as_json_too(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl", "metrics")
    writer.write({"domains": {"prose": float("nan")}, "list": [float("inf")]})
    writer.close()
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "m.jsonl").read_text()


def test_rewind_drops_the_lines_of_later_steps_and_goes_on(tmp_path):
    path = metrics(tmp_path / "m.jsonl", steps=5)
    writer = JsonlWriter(path, "metrics")
    writer.write({"note": "a line without a step stays"})
    writer.rewind(2)
    writer.write({"step": 3, "train/nll": 9.0})
    writer.close()
    assert read_jsonl(path) == [
        {"step": 1, "train/nll": 1 / 7},
        {"step": 2, "train/nll": 2 / 7},
        {"note": "a line without a step stays"},
        {"step": 3, "train/nll": 9.0},
    ]
    assert json.loads(path.read_text().split("\n")[0]) == {"format_version": 1, "kind": "metrics"}


def test_rewind_gets_past_a_torn_line(tmp_path):
    path = metrics(tmp_path / "m.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    writer = JsonlWriter(path, "metrics")
    writer.rewind(1)
    writer.close()
    assert [record["step"] for record in read_jsonl(path)] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
def test_a_line_that_finds_the_disk_full_waits_and_is_an_error_where_it_must_be_there(capsys):
    writer = JsonlWriter(Path("/dev/full"), "metrics")
    try:
        writer.write({"step": 1})
        assert "disk is full" in capsys.readouterr().err
        writer.write({"step": 2})
        assert not capsys.readouterr().err  # said once
        with pytest.raises(StorageError, match="disk is full"):
            writer.flush()
    finally:
        with contextlib.suppress(OSError, StorageError):  # what could not be written is tried once more
            writer.close()


def test_what_a_checkpoint_builds_on_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    writer = JsonlWriter(tmp_path / "lines.jsonl", "metrics")
    monkeypatch.setattr(os, "fsync", synced.append)
    writer.write({"step": 1})
    assert not synced, "not every line is waited for"
    writer.flush(sync=True)
    assert len(synced) == 1
    writer.close()
