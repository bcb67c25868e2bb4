"""The fixture that makes run folders for the tests of the report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import fill_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a run folder: done, with or without control, or in another state."""

    def make(*, control: bool = True, state: str = "done", **changes: Any) -> Path:
        run = tmp_path / "demo"
        run.mkdir()
        fill_run(run, control=control, state=state, **changes)
        return run

    return make
