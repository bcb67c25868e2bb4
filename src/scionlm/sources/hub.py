"""What can go wrong with the Hugging Face hub, in our own words."""

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path

from scionlm.core.errors import DataError, StorageError
from scionlm.core.files import storage_error

_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextlib.contextmanager
def hub_errors(what: str, instead: str) -> Generator[None, None, None]:
    """Turn the hub's errors into ours.

    Args:
        what: What is asked of the hub.
        instead: What a person without the hub can do.

    Raises:
        DataError: There is no such thing on the hub, or its terms have to be accepted first.
        StorageError: It cannot be reached, or the cache cannot be written.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(
            f"{what} is gated: accept its terms on its page at huggingface.co, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise unreachable(what, instead) from error
        raise DataError(f"{what}: the Hugging Face hub has no such public repository, revision or file") from error
    # Its HTTP library's own errors are no OSError; which library that is differs by version.
    except (errors.OfflineModeIsEnabled, errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        if isinstance(error, OSError) and error.errno in _HERE:
            raise storage_error(error, Path(error.filename or "the hub's cache")) from error
        raise unreachable(what, instead) from error


def unreachable(what: str, instead: str) -> StorageError:
    """Return the error of what the hub was not there to give."""
    return StorageError(f"{what}: the Hugging Face hub cannot be reached (offline?); {instead}")
