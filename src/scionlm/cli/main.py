"""`scion`: the commands, and how every failure becomes one clear line and an exit code."""

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

import typer

from scionlm.cli.commands import app
from scionlm.core.errors import ScionError, StoppedError, is_out_of_memory


def main() -> None:
    """Run the command line and exit with the code that DESIGN section 2 gives."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return the exit code."""
    debug = "--debug" in arguments
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="scion")
        if isinstance(code, int) and code:  # typer turns Ctrl-C into an exit code of its own
            print("interrupted", file=sys.stderr)
            return code
    except BrokenPipeError:
        return 74  # nobody reads our output any more (`scion ... | head`)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except _TerminatedError:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:  # the last line of defence: everything becomes a message and a code
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        if type(error).__name__ == "NoArgsIsHelpError":  # `scion` alone: its message is the help
            print(error, file=sys.stderr)
        elif not getattr(error, "told", False):
            stopped = code == StoppedError.exit_code  # as asked for: that is no error
            print(message if stopped else f"error: {message}", file=sys.stderr)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class _TerminatedError(BaseException):
    """SIGTERM came where nothing catches it to save: unwind, so that half-written files are taken away."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for an error."""
    if isinstance(error, ScionError):
        fault = " (a fault in Scion; --debug shows where)" if error.exit_code == 1 else ""
        return f"{error}{fault}", error.exit_code
    format_message = getattr(error, "format_message", None)
    if callable(format_message):  # a wrong flag or argument; typer brings its own copy of click's exceptions
        path = getattr(getattr(error, "ctx", None), "command_path", "scion")
        return f"{str(format_message()).rstrip('.')}; see {path} --help", 2
    if isinstance(error, OSError):
        from scionlm.core.files import storage_error

        known = storage_error(error, Path(error.filename or "the output"))
        return str(known), known.exit_code
    if is_out_of_memory(error):
        from scionlm.planning.memory import LESS_MEMORY

        elsewhere = "other commands with a lower --num-sequences, --seq-len or --batch-size"
        return f"out of memory; a run takes less with {LESS_MEMORY}, {elsewhere}", 74
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (a fault in Scion; --debug shows where)", 1


if __name__ == "__main__":
    main()
