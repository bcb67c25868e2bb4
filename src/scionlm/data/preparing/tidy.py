"""What a finished data folder does not need is taken away."""

import contextlib
import re
import shutil
from pathlib import Path

from scionlm.core.files import is_leftover
from scionlm.core.records import read_json
from scionlm.data.preparing.job import WORK

_SHARD = re.compile(r"(train|held_out)-[0-9-]+(-cut)?\.safetensors")


def tidy(out: Path) -> None:
    """Remove the work in progress and the shards that no index lists: pieces beyond a limit, or left by a kill.

    Another process may be doing the same.
    """
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in out.iterdir():
        if is_leftover(path):
            path.unlink(missing_ok=True)
    for name, splits in read_json(out / "index.json")["domains"].items():
        listed = {shard["file"] for split in splits.values() for shard in split["shards"]}
        for path in (out / name).iterdir():
            if path.name not in listed and (_SHARD.fullmatch(path.name) or is_leftover(path)):
                path.unlink(missing_ok=True)


def clear(out: Path, whole: bool) -> None:
    """Take away what a failed attempt has left: the folder itself if `whole`, else what we know by name in it."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for name in ("prepare.json", ".lock"):
        (out / name).unlink(missing_ok=True)
    if whole:
        with contextlib.suppress(OSError):
            out.rmdir()
