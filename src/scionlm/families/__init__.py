"""What a Hugging Face decoder is made of, as data: tensors, axes, ties, per-layer config lists, hook points."""

from scionlm.families.registry import family_of
from scionlm.families.shape import ModelShape, count_parameters, flops_per_token
from scionlm.families.spec import FamilySpec, TensorSpec

__all__ = ["FamilySpec", "ModelShape", "TensorSpec", "count_parameters", "family_of", "flops_per_token"]
