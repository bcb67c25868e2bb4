"""Files that are complete or absent: atomic writes, staged folders, hashes, safe names.

Everything is written beside its place, flushed to the disk and then renamed, so that a kill at any moment leaves the
old state or the new one, and a failure leaves nothing behind.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError

from scionlm.core.errors import StorageError, UsageError
from scionlm.core.log import warn

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_safe_name(name: str) -> bool:
    """Return whether `name` can be a file or folder name anywhere: letters, digits, `.`, `_`, `-`, at most 64."""
    return _NAME.fullmatch(name) is not None


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the error for the user when writing or reading `path` failed with `error`."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EACCES: "permission denied; choose another folder or change its permissions",
        errno.EPERM: "operation not permitted; choose another folder or change its permissions",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
        errno.EISDIR: "it is a folder; choose another path",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    }
    reason = advice.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot use {path}: {reason}")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that nobody else has, several machines in one folder included; see `is_leftover`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the whole old file or the whole new one.

    Raises:
        StorageError: The folder cannot be made or written, or the disk is full.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`; see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8", "surrogatepass"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_leftover(path: Path) -> bool:
    """Return whether a file is what a kill left of an atomic write."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, name: str) -> None:
    """Take away what kills have left in a folder that nobody else writes to.

    Args:
        folder: The folder.
        name: Of the folders that are staged in it, up to where they differ.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith(f".{name}") and path.name.endswith(".tmp"):
                shutil.rmtree(path, ignore_errors=True)
            elif is_leftover(path):
                path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Take a folder away so that a kill leaves all of it, or a leftover that `remove_leftovers` knows."""
    aside = _temporary(path)
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def require_free_folder(out: Path) -> None:
    """Check that `out` can become a new folder: absent or empty, and creatable.

    Raises:
        UsageError: `out` holds something, or is a file.
        StorageError: It cannot be created or written.
    """
    try:
        if out.is_dir():
            if any(path.name != _LOCK and not is_leftover(path) for path in out.iterdir()):
                raise UsageError(f"output folder {out} is not empty; choose another one or remove it first")
        elif out.exists() or out.is_symlink():
            raise UsageError(f"output {out} exists and is not a folder; choose another path")
    except OSError as error:
        raise storage_error(error, out) from error
    require_writable(out)


def require_writable(out: Path) -> None:
    """Check that something can be made in `out`, or in the nearest folder above that is there.

    Raises:
        StorageError: It cannot.
    """
    parent = out
    try:
        while not parent.exists():
            parent = parent.parent
        # Asking the system by doing it: permission bits say little to root, on network disks, or in containers.
        probe = _temporary(parent / "scion")
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)  # another process may have tidied it up
    except OSError as error:
        raise storage_error(error, out) from error


@contextlib.contextmanager
def staged_folder(out: Path) -> Generator[Path, None, None]:
    """Give a temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        UsageError: `out` is there and not empty.
        StorageError: The folder cannot be written or moved into place.
    """
    require_free_folder(out)
    made: list[Path] = []
    parent = out.parent
    while not parent.exists():
        made.append(parent)
        parent = parent.parent
    # Named before it is made: a signal between the two leaves nothing that is not taken away.
    stage = out.parent / f".{out.name}.{secrets.token_hex(8)}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700)
        yield stage
        for path in sorted(stage.rglob("*")):
            settle(path)
        _fsync_folder(stage)
        stage.chmod(0o777 & ~_umask())
        if out.is_dir():
            (out / _LOCK).unlink(missing_ok=True)
            out.rmdir()
        stage.rename(out)
        _fsync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:  # innermost first: what this call created, it takes away again
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise storage_error(error, out) from error
        if isinstance(error, SafetensorError):  # what the library raises when the disk is full
            raise StorageError(
                f"cannot write {out}: {error}; free some space and run the same command again"
            ) from error
        raise


def settle(path: Path) -> None:
    """Flush a finished file or folder to the disk; a file gets the permissions that the umask asks for.

    (safetensors leaves its files readable by their owner alone.)
    """
    if path.is_dir():
        _fsync_folder(path)
        return
    path.chmod(0o666 & ~_umask())
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Generator[None, None, None]:
    """Hold `folder` for this process alone; the system lets go of it when the process ends, however it ends.

    Where the file system knows no locks a warning says so, and nothing is held.

    Args:
        folder: The folder.
        wait: Wait until it is free.

    Raises:
        UsageError: Another process holds it.
        StorageError: It cannot be locked.
    """
    path = folder / _LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise storage_error(error, path) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip()
            by = f" ({holder})" if holder else ""
            raise UsageError(f"{folder} is in use by another scion process{by}; wait for it or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise storage_error(error, path) from error
            warn(f"the file system of {folder} knows no locks: let one process at a time work in it")
        if wait:  # what others wait for is soon over: nobody has to be named
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def try_lock(path: Path) -> Generator[bool, None, None]:
    """Try to hold a lock file; give False at once where another process holds it.

    Where the file system knows no locks it gives True: what is locked so must bear being done twice.

    Raises:
        StorageError: The file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise storage_error(error, path) from error
    with file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise storage_error(error, path) from error
        yield mine
