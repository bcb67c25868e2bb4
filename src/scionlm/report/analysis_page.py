"""The page of an analysis."""

from pathlib import Path


def write_analysis_page(folder: Path) -> Path:
    """Write the page."""
    return folder / "report.html"
