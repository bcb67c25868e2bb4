"""Surgery: a pure function of (source, plan) to (target, provenance) that proves itself; the source stays as it was."""

from scionlm.surgery.apply import inherit_model, random_model
from scionlm.surgery.depth import STRATEGIES, DepthPlan, parse_keep, plan_depth
from scionlm.surgery.export import save_model
from scionlm.surgery.verify import Proof, verify_export, verify_inheritance

__all__ = [
    "STRATEGIES",
    "DepthPlan",
    "Proof",
    "inherit_model",
    "parse_keep",
    "plan_depth",
    "random_model",
    "save_model",
    "verify_export",
    "verify_inheritance",
]
