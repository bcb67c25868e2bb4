"""The errors that a user can meet, each with the exit code that `scion` ends with.

A message is one or two lines: what is wrong, where (file, key, value), and what to do.
"""


class ScionError(Exception):
    """Any failure that Scion explains; raised itself it means a fault in Scion.

    Attributes:
        exit_code: What `scion` ends with.
        told: Whether another process of the run says it.
    """

    exit_code = 1
    told = False


class UsageError(ScionError):
    """The request is wrong: a flag, a key, a value, a local path, an output folder in the way."""

    exit_code = 2


class DivergenceError(ScionError):
    """Training produced a loss or a gradient that is not finite."""

    exit_code = 3


class DataError(ScionError):
    """The data or the model given is broken or does not fit."""

    exit_code = 65


class NewerFormatError(DataError):
    """A later version of Scion wrote a file."""


class BrokenModelError(DataError):
    """A model's loss is not finite: its weights are broken."""


class StorageError(ScionError):
    """The disk or the network failed: unwritable, full, offline."""

    exit_code = 74


class LostRankError(StorageError):
    """Another process of the run is gone: killed, or on a machine that cannot be reached any more."""


class StoppedError(ScionError):
    """A signal stopped the run after it was saved; the same command goes on."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a GPU, by the name of torch's error: core knows no torch."""
    return isinstance(error, MemoryError) or "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}


def exit_code_of(error: BaseException) -> int:
    """Return the code that the process ends with for an error."""
    if isinstance(error, ScionError):
        return error.exit_code
    if isinstance(error, OSError) or is_out_of_memory(error):
        return StorageError.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
