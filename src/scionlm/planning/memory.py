"""How much memory training takes, part by part."""

from dataclasses import dataclass
from math import prod
from typing import Any

from scionlm.families import ModelShape, count_parameters
from scionlm.families.causal import kept_softmax
from scionlm.families.logits import BLOCK_BYTES, CHUNK_BYTES
from scionlm.families.shape import expected_tensors

TIGHT = 0.9
"""Share of a device's memory above which a step is expected not to fit."""
LESS_MEMORY = (
    "train.micro_batch_size=auto, train.activation_checkpointing=selective (or full), or a smaller data.seq_len"
)
"""Settings with which a step takes less memory."""
# Python, torch, transformers, and what a run of a tiny model has beside: as measured.
_LIBRARIES = {"cpu": 580 * 2**20, "cuda": 600 * 2**20}
_KEPT_BY_ERROR = {"mse": 4, "cosine": 8}  # bytes a state, as autograd was seen to keep
_FLOAT32_COPIES = 4  # of a block of logits: scaled, as logarithms, as gradient, and one in the making


@dataclass(frozen=True)
class MemoryRequest:
    """What decides the memory of a training run.

    Attributes:
        seq_len: Predicted tokens in a sequence.
        micro_batch_size: Sequences in one pass.
        precision: `fp32` or `bf16`.
        optimizer: `adamw` or `muon`.
        averages: Averaged copies of the weights.
        kind: `cpu` or `cuda`.
        checkpointing: What of the activations is made again: `none`, `selective` or `full`.
        shards: Devices that hold one copy of the weights between them.
    """

    seq_len: int
    micro_batch_size: int
    precision: str
    optimizer: str
    averages: int
    kind: str
    checkpointing: str = "none"
    shards: int = 1


@dataclass(frozen=True)
class Teaching:
    """What decides the memory of a teacher.

    Attributes:
        config: Its `config.json`.
        layers: Layers of the student that learn what its layers give out.
        error: How that is measured, `mse` or `cosine`.
    """

    config: dict[str, Any]
    layers: int = 0
    error: str | None = None

    def projections(self, student: ModelShape) -> int:
        """Return the parameters of the projections between two widths; without them where the widths are the same."""
        width = ModelShape.of(self.config).hidden_size
        return self.layers * width * student.hidden_size if width != student.hidden_size else 0


def training_memory(
    hf_config: dict[str, Any], request: MemoryRequest, teaching: Teaching | None = None
) -> dict[str, int]:
    """Return the bytes of each part, and their `total`, at the height of a step on one device.

    Args:
        hf_config: Its `config.json`.
        request: What else decides.
        teaching: The teacher, where something is learned from one.

    Weights, gradients and optimizer state are exact. Activations are what autograd keeps in a layer of a Llama, fitted
    to what it was seen to keep (within a few percent there, within a third for other families); of attention's softmax
    on a CPU what `families.causal` says.
    """
    shape = ModelShape.of(hf_config)
    parameters = count_parameters(hf_config)["total"]
    width = 2 if request.precision == "bf16" else 4
    tokens = request.seq_len * request.micro_batch_size
    heads = shape.num_attention_heads * shape.head_dim
    # In each layer: two norms, the residual stream, four of the heads' size, four of the MLP's.
    kept = width * (4.7 * shape.hidden_size + 4 * heads + 4 * shape.intermediate_size)
    kept += 4 * shape.hidden_size if width == 2 else 0  # the norms compute in float32
    softmax = shape.num_attention_heads * kept_softmax(request.seq_len) / request.seq_len
    softmax *= width if request.kind == "cpu" and width == 2 else 0
    kept += softmax
    layers = shape.num_hidden_layers
    kv = shape.num_key_value_heads * shape.head_dim
    again = {  # what stays of each layer, beside all of the one that is made again
        "full": width * shape.hidden_size,
        "selective": width * (3 * shape.hidden_size + 2 * heads + 2 * kv + 2 * shape.intermediate_size) + softmax,
    }
    stays = again.get(request.checkpointing)
    activations = kept * layers if stays is None else stays * layers + kept
    share = request.shards
    parts = {
        "weights": 4 * parameters // share,
        "gradients": 4 * parameters // share,
        "optimizer": optimizer_bytes(hf_config, request.optimizer) // share,
        "averages": 4 * parameters * request.averages // share,
        "compute_copies": _gathered(hf_config, width) if share > 1 else 2 * parameters if width == 2 else 0,
        "activations": int(tokens * activations),
        "activation_gradients": int(tokens * kept),  # of the layer that is passed backwards
        "logits": _head_bytes(shape, tokens, width, request.kind, 2 if teaching else 1),
        "libraries": _LIBRARIES[request.kind],
    }
    if teaching:
        taught = ModelShape.of(teaching.config)
        own = width * count_parameters(teaching.config)["total"]
        passing = width * tokens * (4 * taught.hidden_size + 3 * taught.intermediate_size)  # of one layer at a time
        # Of each taught layer the teacher's states, and what the error keeps of both in float32.
        states = tokens * taught.hidden_size * teaching.layers * (width + _KEPT_BY_ERROR.get(teaching.error or "", 0))
        own = own // share + (_gathered(teaching.config, width) if share > 1 else 0)
        parts["teacher"] = own + passing + states + 16 * teaching.projections(shape)
    return parts | {"total": sum(parts.values())}


def _gathered(hf_config: dict[str, Any], width: int) -> int:
    """Return what is whole at a time of shared weights: what is outside the layers, two layers, gradients of one."""
    by_part = count_parameters(hf_config)
    inside = sum(prod(p.shape) for p in expected_tensors(hf_config) if p.layer is not None)
    one = inside // ModelShape.of(hf_config).num_hidden_layers
    return width * (by_part["total"] - inside + 2 * one) + 4 * one


def _head_bytes(shape: ModelShape, tokens: int, width: int, kind: str, models: int) -> int:
    """Return what the losses of the head take: a chunk of logits, a block of it in float32, the head's gradient."""
    chunk = min(tokens * shape.vocab_size * width, CHUNK_BYTES)
    block = chunk * 4 // width if kind == "cuda" else min(BLOCK_BYTES, chunk * 4 // width)
    head = shape.vocab_size * shape.hidden_size * (4 + (width if width == 2 else 0))
    return models * (chunk + _FLOAT32_COPIES * block) + head


def optimizer_bytes(hf_config: dict[str, Any], name: str) -> int:
    """Return the bytes of an optimizer's state: two moments a weight, or one where Muon has it."""
    total = 0
    for place in expected_tensors(hf_config):
        size = prod(place.shape)
        muon = name == "muon" and len(place.shape) == 2 and place.layer is not None
        total += size * (4 if muon else 8)
    return total


def checkpoint_bytes(hf_config: dict[str, Any], optimizer: str, averages: int, teaching: Teaching | None = None) -> int:
    """Return the bytes of one checkpoint."""
    parameters = count_parameters(hf_config)["total"]
    beside = 12 * teaching.projections(ModelShape.of(hf_config)) if teaching else 0
    return beside + 4 * parameters * (1 + averages) + optimizer_bytes(hf_config, optimizer)
