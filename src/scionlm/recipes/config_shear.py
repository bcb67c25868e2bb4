"""The sections of a recipe that prunes: the shape that is to be left, and how what stays is chosen."""

from collections.abc import Mapping as Given
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from scionlm.core.config import Mapping, Section
from scionlm.core.duration import Duration
from scionlm.core.quantities import Count, Steps
from scionlm.recipes.config_inherit import SIZES, Importance, InheritConfig
from scionlm.recipes.measured import DEPTHS

ShearFidelity = Literal["recommended", "paper", "code"]
DEPTH = "num_hidden_layers"
BUDGETS = ("parameters", "memory_bytes", "seconds_per_token")


class TargetConfig(Section):
    """The shape that is to be left: sizes, a known model's, or the best that a budget has room for."""

    shape: str | None = None
    """A known small model whose sizes are taken; an unknown name is answered with those that are known."""
    num_hidden_layers: int | None = None
    """Layers; null keeps all, as for the other sizes."""
    hidden_size: int | None = None
    """Channels of the residual stream."""
    intermediate_size: int | None = None
    """Channels of each MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads; each keeps as many query heads as any other."""
    parameters: Count | None = None
    """Budget: this many parameters, from which `scion plan` makes candidates; a run takes the first of them."""
    memory_bytes: Count | None = None
    """Budget: bytes of the weights at two bytes each."""
    seconds_per_token: float | None = Field(default=None, gt=0)
    """Budget: time to write one token on this machine, as far as its memory and processor decide it."""

    @model_validator(mode="after")
    def _one_way(self) -> "TargetConfig":
        ways = [name for name in ("shape", *BUDGETS) if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"set one of {', '.join(ways)}, the others null")
        if not ways and not self.sizes:
            raise ValueError(f"name sizes ({', '.join((DEPTH, *SIZES))}), a shape, or a budget ({', '.join(BUDGETS)})")
        if ways and self.sizes and not self.is_settled:
            raise ValueError(f"{ways[0]} says every size; leave {next(iter(self.sizes))} out")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return {name: value for name in (DEPTH, *SIZES) if (value := getattr(self, name)) is not None}

    @property
    def is_settled(self) -> bool:
        """Whether every size is there: the file says so, or a run has worked it out."""
        return len(self.sizes) == 1 + len(SIZES)


class GatesConfig(Section):
    """How masks are learned; null takes what `fidelity` says."""

    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the gates."""
    multiplier_lr: float | None = Field(default=None, gt=0)
    """Step of the multipliers that hold the gates to the target."""
    ascent: Literal["exact", "plain", "adam"] | None = None
    """How the multipliers are found that hold the gates to the target: solved for in every step, so that it is always
    met; risen by how far it is missed; or risen by Adam's steps, which do not depend on that."""
    sharpen: float | None = Field(default=None, ge=1)
    """exact: what gates are multiplied by, a little in each step, until masks are hard: they end open or closed."""
    cap: float | None = Field(default=None, gt=0)
    """Largest multiplier."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the gates' distribution."""
    constraint: Literal["calibrated", "published"] | None = None
    """`published` counts a closed gate as slightly open, so that some of the units that stay have to be closed too."""
    depth: Literal["layers", "blocks"] = "layers"
    """One gate a layer, or one each on its attention and its MLP; the layers that stay are whole either way."""
    start: Literal["open", "magnitude", "activation", "taylor"] | None = None
    """Where gates begin: open, or in the order of importance scores."""
    spread: float = Field(default=2.0, gt=0, le=9)
    """How far apart they begin where scores order them, in the logarithm of the odds to be open."""
    warmup: Steps = 0.2
    """Length of the rise of the share that is to go."""
    finish: Steps | None = None
    """Length of the end in which masks are hard and only weights move."""

    @field_validator("warmup", "finish")
    @classmethod
    def _no_time(cls, value: int | float | str | None) -> int | float | str | None:
        if value is not None and Duration.parse(value).unit == "seconds":
            raise ValueError("a length in steps, tokens or as a share of the pruning; times are for the recovery")
        return value


GATES_BY_FIDELITY: dict[ShearFidelity, dict[str, Any]] = {
    "recommended": {
        "lr": 0.1, "multiplier_lr": 1.0, "ascent": "exact", "sharpen": 10.0, "cap": None, "temperature": 2 / 3,
        "constraint": "calibrated", "start": "activation", "finish": 0.2,
    },
    # arXiv 2310.06694v2: appendix A and table 7; where it is silent, as its code.
    "paper": {
        "lr": 1.0, "multiplier_lr": 1.0, "ascent": "adam", "sharpen": 1.0, "cap": None, "temperature": 0.83,
        "constraint": "published", "start": "open", "finish": 0,
    },
    # princeton-nlp/LLM-Shearing at b87218b: l0_module.py and scripts/pruning.sh.
    "code": {
        "lr": 1.0, "multiplier_lr": 1.0, "ascent": "adam", "sharpen": 1.0, "cap": None, "temperature": 2 / 3,
        "constraint": "published", "start": "open", "finish": 0,
    },
}  # fmt: skip


class PruneConfig(Section):
    """What is done before the model of the target's shape is trained."""

    method: Literal["masks", "scores", "first", "random"] = "masks"
    """`masks` are learned while the source is trained; `scores` keeps what is most important, in one go or in steps;
    `first` and `random` are what choosing has to be better than."""
    tokens: Count | None = None
    """Budget in tokens, rounded up to whole steps; it comes on top of the recovery's. Null: none, but `masks` need
    one."""
    steps: Count | None = None
    """Budget in optimizer steps, instead of tokens."""
    importance: Importance | None = None
    """scores: which heads and channels stay; null is `activation`."""
    strategy: str | None = None
    """scores: which layers stay, one of `inherit.strategy`; null is `block_influence`."""
    iterations: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """scores: in how many steps, each trained on its part of the tokens and measured again; `auto` takes off a third of
    any size at most in each."""
    gates: GatesConfig = GatesConfig()
    """masks: how they are learned."""
    data: Mapping | None = None
    """Keys of `data` that differ while pruning, as in a stage."""
    train: Mapping | None = None
    """Keys of `train`."""
    optimizer: Mapping | None = None
    """Keys of `optimizer`."""
    schedule: Mapping | None = None
    """Keys of `schedule`, which goes over the pruning alone; gates and multipliers follow it too."""
    reweight: Mapping | None = None
    """Keys of `reweight`; null is none, whatever the top level says. A recovery that moves weights too begins with what
    pruning ends with."""
    distill: bool = True
    """Whether what `distill` says holds while pruning too, states of layers excepted."""

    @model_validator(mode="after")
    def _consistent(self) -> "PruneConfig":
        if self.tokens is not None and self.steps is not None:
            raise ValueError("set either tokens or steps, the other null")
        if self.method == "masks" and not self.is_trained:
            raise ValueError("masks are learned in training; set prune.tokens or prune.steps")
        if self.method in ("first", "random") and self.is_trained:
            raise ValueError(f"method {self.method} chooses without training; give its tokens to train")
        for key in ("importance", "strategy"):
            if getattr(self, key) is not None and self.method != "scores":
                raise ValueError(f"{key} is for method scores, not {self.method}")
        if self.iterations != "auto" and self.method != "scores":
            raise ValueError(f"iterations is for method scores, not {self.method}")
        if self.strategy is not None:
            InheritConfig(layers=1, strategy=self.strategy)
            if self.strategy.partition(":")[0] in (*DEPTHS, "stack", "hybrid_stack"):
                raise ValueError(f"strategy {self.strategy} says itself how many layers stay; the target does")
        train = self.train or {}
        for key in ("steps", "tokens", "time"):
            if key in train:
                raise ValueError(f"the budget is prune.tokens or prune.steps, not prune.train.{key}")
        if train.get("micro_batch_size") == "auto":
            raise ValueError("micro_batch_size: auto is for the whole run; set train.micro_batch_size")
        return self

    @model_serializer(mode="wrap")
    def _what_was_set(self, serialize: SerializerFunctionWrapHandler) -> Mapping:
        """Leave out `reweight` where it was left out: an explicit null means something else."""
        return {
            key: value for key, value in serialize(self).items() if key != "reweight" or key in self.model_fields_set
        }

    @property
    def is_trained(self) -> bool:
        """Whether it has a budget."""
        return (self.tokens, self.steps) != (None, None)

    def check_gates(self, fidelity: ShearFidelity, steps: int, tokens_per_step: int) -> None:
        """Check that masks have room to be learned in a number of steps.

        Raises:
            ValueError: They have not.
        """
        how = self.gate_settings(fidelity)
        warmup, finish = (Duration.parse(how[key]).in_steps(steps, tokens_per_step) for key in ("warmup", "finish"))
        if warmup + finish >= steps:
            raise ValueError(
                f"prune.gates: warmup ({warmup} steps) and finish ({finish}) leave no step of {steps} in which masks "
                "are at their target and still move; make them shorter, or give pruning more tokens"
            )

    def gate_settings(self, fidelity: ShearFidelity) -> Given[str, Any]:
        """Return how masks are learned, with what was left open filled in."""
        given = self.gates.model_dump()
        usual = GATES_BY_FIDELITY[fidelity]
        return {key: usual[key] if value is None and key in usual else value for key, value in given.items()}
