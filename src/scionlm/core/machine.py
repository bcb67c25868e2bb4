"""Facts about the machine that need no torch."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path


def usable_cores() -> int:
    """Return the CPU cores that this process may use: what OMP_NUM_THREADS says, else its share of all.

    torchrun sets that variable to 1 where nobody has set it: its 1 is no request.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if asked.isdigit() and int(asked) > 0 and not by_torchrun:
        return int(asked)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(allowed // local_processes(), 1)


def local_processes() -> int:
    """Return how many processes torchrun has started on this machine; one without it."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(count) if count.isdigit() and int(count) > 0 else 1


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(*more: str) -> dict[str, str]:
    """Return the versions that decide a run's numbers, and of more packages where they are installed."""
    found = {"python": platform.python_version()}
    for name in ("scionlm", "torch", "transformers", "tokenizers", "safetensors", "numpy", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, `+` after it when files are changed, or None."""
    folder = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *words], capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into some other project's checkout, the commit found would not be ours.
    if not ask("ls-files", "--error-unmatch", str(Path(__file__))):
        return None
    commit = ask("rev-parse", "HEAD")
    return commit and commit + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
