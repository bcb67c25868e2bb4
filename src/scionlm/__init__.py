"""Scion makes a strong small base language model out of a large one with few tokens.

    import scionlm as scion

    small = scion.inherit("HuggingFaceTB/SmolLM2-135M", layers=15)
    result = scion.run("inheritune-mini", {"data.dir": "data"}, out="runs/mini")

Importing this module is cheap; torch is loaded by the first call that needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scionlm.api import analyze, compare, evaluate, evaluate_model, export, inherit, plan, prepare, run

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "analyze",
    "compare",
    "evaluate",
    "evaluate_model",
    "export",
    "inherit",
    "plan",
    "prepare",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from scionlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'scionlm' has no attribute {name!r}")
