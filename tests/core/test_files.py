"""Files that are complete or absent."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core import files
from scionlm.core.errors import StorageError, UsageError
from scionlm.core.files import (
    folder_lock,
    is_safe_name,
    require_free_folder,
    sha256_file,
    staged_folder,
    write_bytes_atomic,
    write_text_atomic,
)

quick = settings(max_examples=300)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return all that a folder holds, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def fail_with(number: int):
    def raiser(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return raiser


@pytest.fixture
def umask_027():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_an_atomic_write_makes_its_folder_and_writes_the_bytes(tmp_path):
    write_bytes_atomic(tmp_path / "a" / "b" / "file", b"\0\xff")
    assert everything(tmp_path) == {"a": None, "a/b": None, "a/b/file": b"\0\xff"}


def test_an_atomic_write_replaces_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"a longer old content")
    write_text_atomic(tmp_path / "file", "né")
    assert everything(tmp_path) == {"file": "né".encode()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch, number):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(StorageError) as caught:
        write_bytes_atomic(tmp_path / "file", b"new")
    assert caught.value.exit_code == 74
    assert str(tmp_path / "file") in str(caught.value)
    assert everything(tmp_path) == {"file": b"old"}


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="disk is full; free some space and run the same command again"):
        write_bytes_atomic(tmp_path / "file", b"new")


def test_a_write_that_is_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "file", b"new")
    assert everything(tmp_path) == {"file": b"old"}


def test_a_write_through_a_file_or_over_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="not a folder"):
        write_bytes_atomic(tmp_path / "file" / "inner", b"x")
    with pytest.raises(StorageError):
        write_bytes_atomic(tmp_path / "folder", b"x")
    assert everything(tmp_path) == {"file": b"", "folder": None}


def test_the_hash_is_sha256_and_one_bit_changes_it(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    before = sha256_file(tmp_path / "file")
    assert before == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "file").write_bytes(b"abb")
    assert sha256_file(tmp_path / "file") != before


def test_a_staged_folder_appears_only_when_it_is_complete(tmp_path):
    with staged_folder(tmp_path / "a" / "out") as stage:
        (stage / "inner").mkdir()
        (stage / "inner" / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
        assert stage.parent == tmp_path / "a"  # the same disk, so that the rename is one
    assert everything(tmp_path) == {"a": None, "a/out": None, "a/out/inner": None, "a/out/inner/file": b"x"}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_staged_folder_vanishes_on_an_exception_with_the_parents_it_made(tmp_path, error):
    (tmp_path / "mine").mkdir()

    def work():
        with staged_folder(tmp_path / "mine" / "a" / "b" / "out") as stage:
            (stage / "file").write_text("x")
            raise error

    with pytest.raises(type(error)):
        work()
    assert everything(tmp_path) == {"mine": None}


def test_a_staged_folder_that_fails_leaves_what_others_put_beside_it(tmp_path):
    def work():
        with staged_folder(tmp_path / "a" / "out"):
            (tmp_path / "a" / "other").write_text("theirs")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert everything(tmp_path) == {"a": None, "a/other": b"theirs"}


def test_a_staged_folder_on_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="disk is full") as caught, staged_folder(tmp_path / "a" / "out") as stage:
        (stage / "file").write_text("x")
    assert caught.value.exit_code == 74
    assert everything(tmp_path) == {}


def test_a_staged_folder_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("x")
    with pytest.raises(UsageError, match="is not empty"), staged_folder(tmp_path / "out"):
        pytest.fail("the block must not start")
    assert everything(tmp_path) == {"out": None, "out/keep": b"x"}


def test_a_staged_folder_refuses_a_file_and_a_dangling_link(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="not a folder"), staged_folder(tmp_path / name):
            pytest.fail("the block must not start")


def test_a_staged_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as stage:
        (stage / "file").write_text("x")
    assert everything(tmp_path) == {"out": None, "out/file": b"x"}


def test_a_staged_folder_and_its_files_get_the_permissions_of_the_umask(tmp_path, umask_027):
    with staged_folder(tmp_path / "out") as stage:
        (stage / "private").write_text("x")
        (stage / "private").chmod(0o600)  # as safetensors leaves its files
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode) == 0o640


def test_an_output_below_a_file_is_refused_with_the_code_of_the_disk(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        require_free_folder(tmp_path / "file" / "out")
    assert caught.value.exit_code == 74


def test_asking_whether_a_folder_is_free_leaves_no_trace(tmp_path):
    require_free_folder(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    require_free_folder(tmp_path / "empty")
    assert everything(tmp_path) == {"empty": None}


def test_what_a_kill_leaves_of_asking_takes_no_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *arguments, **options: None)
        require_free_folder(tmp_path)
    assert everything(tmp_path)
    require_free_folder(tmp_path)


@quick
@given(st.text(max_size=80) | st.from_regex(r"[A-Za-z0-9._-]{1,70}", fullmatch=True))
def test_a_safe_name_is_one_visible_part_of_a_path(name):
    if is_safe_name(name):
        assert Path(name).parts == (name,)
        assert name not in (".", "..")
        assert not name.startswith((".", "-"))
        assert 1 <= len(name.encode()) <= 64
        assert name.isascii()
        assert name.isprintable()


@pytest.mark.parametrize("name", ["prose", "a", "A-1_b.c", "x" * 64])
def test_ordinary_names_are_safe(name):
    assert is_safe_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "-x", "a/b", "a\\b", "a\n", "a b", "a\0", "é", "x" * 65, "~", "a:b"]
)
def test_other_names_are_not_safe(name):
    assert not is_safe_name(name)


TAKE_LOCK = """
import sys
from pathlib import Path
from scionlm.core.errors import ScionError
from scionlm.core.files import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("held")
except ScionError as error:
    print(error.exit_code, error)
"""


def take_lock_elsewhere(folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", TAKE_LOCK, str(folder)], capture_output=True, text=True).stdout


def test_a_lock_refuses_a_second_process_and_is_free_afterwards(tmp_path):
    with folder_lock(tmp_path):
        assert take_lock_elsewhere(tmp_path).startswith(f"2 {tmp_path} is in use by another scion process")
    assert take_lock_elsewhere(tmp_path) == "held\n"


def test_a_lock_left_by_a_killed_process_is_free(tmp_path):
    code = TAKE_LOCK.replace('print("held")', "import os; os._exit(9)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        pass


def test_a_lock_in_a_folder_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError), folder_lock(tmp_path / "absent"):
        pytest.fail("the block must not start")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_from_a_folder_that_is_in_use(tmp_path, monkeypatch, capsys, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with folder_lock(tmp_path):
        assert "knows no locks" in capsys.readouterr().err
    code = errno.EIO
    with pytest.raises(StorageError, match="Input/output error"), folder_lock(tmp_path):
        pytest.fail("the block must not start")
