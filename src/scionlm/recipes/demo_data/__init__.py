"""The demo's data: prose that ships with Scion (see README.md here), and the running Python's standard library."""

import sysconfig
from pathlib import Path
from typing import Any

from scionlm.data import Corpora, DomainConfig, prepare

PROSE = Path(__file__).parent / "prose.jsonl.gz"
DEMO_DOMAINS = {"prose": str(PROSE), "code": str(Path(sysconfig.get_paths()["stdlib"]) / "*.py")}
"""The files of each domain."""


def demo_corpora(tokenizer: str | None) -> Corpora:
    """Return the demo's two domains, for the tokenizer of a MODEL (or for making one)."""
    return Corpora(
        tokenizer=tokenizer, domains={name: DomainConfig(paths=[path]) for name, path in DEMO_DOMAINS.items()}
    )


def prepare_demo_data(tokenizer: str, out: Path) -> dict[str, Any]:
    """Make the demo's data folder, or go on with it; return its index."""
    return prepare(demo_corpora(tokenizer), Path(), out)
