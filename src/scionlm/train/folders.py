"""Where the checkpoints of a run are, without torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]+)", re.ASCII)


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a folder is named after; None for anything else."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else None


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return step and folder of each checkpoint, sound or not, oldest first."""
    found = [(step_of(path), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((step, path) for step, path in found if step is not None)
