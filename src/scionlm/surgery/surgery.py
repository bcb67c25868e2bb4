"""A surgery from beginning to end: sources opened, operations worked out, then a model in memory or files on disk.

transformers is imported where it is needed: files can be on their way to the disk before it is there.
"""

import json
import shutil
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scionlm.core.errors import DataError, StorageError
from scionlm.core.files import write_text_atomic
from scionlm.core.log import Progress
from scionlm.core.tensors import TensorEntry
from scionlm.families import family_of
from scionlm.families.shape import canonical_names
from scionlm.families.weights import FolderWeights, StateWeights, Weights
from scionlm.sources import ModelFolder
from scionlm.sources.folder import tensor_index, weight_map
from scionlm.sources.tensors import FolderTensors
from scionlm.surgery.apply import blocks, whole
from scionlm.surgery.export import generation_settings, write_generation
from scionlm.surgery.fresh import lazy_fresh
from scionlm.surgery.operations import Operation, operations
from scionlm.surgery.plan import SurgeryPlan, plan_without_fresh
from scionlm.surgery.target import target_config
from scionlm.surgery.write import Tensor, Written, is_finite, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scionlm.surgery.proof import Proof

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Surgery:
    """A plan with its donors open.

    Attributes:
        plan: What to make.
        folders: The donors.
        weights: Their tensors.
        config: The target's `config.json`.
        operations: One for each of its tensors.
        dtype: What fresh tensors are stored in: the type that most of the first donor's tensors have.
    """

    plan: SurgeryPlan
    folders: list[ModelFolder]
    weights: list[Weights]
    config: dict[str, Any]
    operations: list[Operation]
    dtype: torch.dtype

    def dtype_of(self, operation: Operation) -> torch.dtype:
        """Return the type in which a tensor of the target is stored: that of the tensor it comes from."""
        if operation.fill != "source":
            return self.dtype
        return self.weights[operation.donor].dtype(operation.source)

    def build(
        self, dtype: torch.dtype, attn_implementation: str | None = None, *, exact: bool = False
    ) -> "PreTrainedModel":
        """Return the target as a transformers model in evaluation mode.

        Args:
            dtype: Type of all weights.
            attn_implementation: transformers' name of the attention kernel; None leaves the choice to it.
            exact: Leave out the rounding to the stored type of what a factor was folded into, for a proof.

        Raises:
            DataError: The source holds numbers that are not finite.
        """
        from transformers import GenerationConfig

        from scionlm.families.models import assemble

        fresh = lazy_fresh(self.config, self.plan.seed)
        state = {op.place.name: whole(op, self.weights, fresh) for op in self.operations}
        if not exact:  # files and memory agree, also where the model is held in a wider type than it is stored in
            state = {op.place.name: state[op.place.name].to(self.dtype_of(op)) for op in self.operations}
        _refuse_not_finite([name for name, tensor in state.items() if not is_finite(tensor)])
        model = assemble(self.config, state, dtype, attn_implementation)
        generation = self.generation_config()
        if generation is not None:
            model.generation_config = GenerationConfig.from_dict(generation)
        return model

    def prove(self, target: "PreTrainedModel") -> "Proof":
        """Prove a float32 target; see `surgery.verify.prove`."""
        from scionlm.surgery.verify import prove

        if self.has_fresh:
            return self._prove_with_fresh(target)
        if any(op.scale is not None and self.dtype_of(op).itemsize < 4 for op in self.operations):
            # What is proven is the numbers before they are rounded; `files.check_files` compares the rounded ones.
            target = self.build(torch.float32, exact=True)
        return prove([folder.config for folder in self.folders], self.weights, self.plan, target)

    @property
    def has_fresh(self) -> bool:
        """Whether any weight is drawn at random."""
        return any(
            op.fill == "random" and (op.place.layer is None or self.plan.layers[op.place.layer].init != "zero_output")
            for op in self.operations
        )

    def without_fresh(self) -> "Surgery":
        """Return the same surgery with everything inherited that could be, and layers that pass their input on."""
        plan = plan_without_fresh(self.plan)
        configs = [folder.config for folder in self.folders]
        return replace(self, plan=plan, operations=operations(configs, self.config, plan))

    def _prove_with_fresh(self, target: "PreTrainedModel") -> "Proof":
        """Prove the same surgery without fresh weights, and that what the target inherits is equal there and here."""
        from scionlm.surgery.verify import prove

        plain = self.without_fresh()
        twin = plain.build(torch.float32)
        proof = plain.prove(twin)
        mine, theirs = target.state_dict(), twin.state_dict()
        # A final norm that takes back the scale of an inherited embedding has nothing to take back from a fresh one.
        scales = {op.place.name: op.scale for op in plain.operations}
        taken = [op for op in self.operations if op.fill == "source"]
        inherited = [op.place.name for op in taken if op.scale == scales[op.place.name]]
        wrong = [name for name in inherited if not torch.equal(mine[name], theirs[name])]
        fresh = len(self.operations) - len(taken)
        what = f"{len(inherited)} inherited tensors are those of the proof, {fresh} are fresh"
        proof.require(what, not wrong, f"({', '.join(wrong[:2])})")
        proof.checks += prove([folder.config for folder in self.folders], self.weights, self.plan, target).checks[1:]
        return proof

    def generation_config(self) -> dict[str, Any] | None:
        """Return the target's `generation_config.json`, or None where the source has none."""
        return generation_settings(self.folders[0], self.plan)

    def write(self, stage: Path, shard_bytes: int = SHARD_BYTES) -> Written:
        """Write weights and configuration into `stage`, a block of memory at a time.

        Raises:
            StorageError: The folder cannot be written.
            DataError: The source holds numbers that are not finite.
        """
        fresh = lazy_fresh(self.config, self.plan.seed)
        stored = family_of(self.config).stored_as
        tensors = [
            Tensor(
                stored.get(op.place.name, op.place.name),
                self.dtype_of(op),
                op.place.shape,
                partial(blocks, op, self.weights, fresh),
            )
            for op in self.operations
        ]
        total = sum(tensor.num_bytes for tensor in tensors)
        free = shutil.disk_usage(stage).free
        if total > free:
            raise StorageError(f"cannot write {stage.parent}: {total:,} bytes are needed, {free:,} are free")
        with Progress("writing weights", total) as progress:
            done = 0

            def advance(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                progress.update(done)

            written = write_weights(tensors, stage, shard_bytes, advance)
        _refuse_not_finite(written.not_finite)
        write_text_atomic(stage / "config.json", json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        write_generation(stage, self.folders[0], self.plan)
        return written


def _refuse_not_finite(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(
            f"tensor {names[0]!r}{more} holds numbers that are not finite (NaN or infinity); nothing was made"
        )


@contextmanager
def open_surgery(folders: list[ModelFolder], plan: SurgeryPlan) -> Generator[Surgery, None, None]:
    """Open the donors and work out what to do.

    Args:
        folders: The plan's donors, in its order.
        plan: What to make.

    Raises:
        DataError: A donor's tensors or configuration are not what its family says.
        UsageError: The sizes asked for cannot be written down for this family.
    """
    assert len(folders) == len(plan.donors)
    configs = [folder.config for folder in folders]
    config = target_config(configs, plan)
    found = operations(configs, config, plan)
    proven = operations(configs, config, plan_without_fresh(plan))  # a proof also reads what is not inherited
    with ExitStack() as stack:
        weights: list[Weights] = []
        for number, folder in enumerate(folders):
            needed = {op.source for op in proven if op.fill == "source" and op.donor == number}
            tensors = stack.enter_context(FolderTensors(folder.path, _needed_tensors(folder, needed)))
            weights.append(FolderWeights(folder.config, tensors, folder.path))
        kinds = Counter(weights[0].dtype(op.source) for op in found if op.fill == "source" and op.donor == 0)
        common = kinds.most_common(1)[0][0] if kinds else torch.float32
        yield Surgery(plan, folders, weights, config, found, common)


def surgery_of(model: "PreTrainedModel", folder: ModelFolder, plan: SurgeryPlan) -> Surgery:
    """Return a surgery on a model in memory.

    Args:
        model: The model.
        folder: Where its configuration, and what goes with it, come from; its weights may be others by now.
        plan: What to make.
    """
    config = target_config([folder.config], plan)
    weights = StateWeights(folder.config, dict(model.named_parameters()), folder.name)
    return Surgery(plan, [folder], [weights], config, operations([folder.config], config, plan), model.dtype)


def _needed_tensors(folder: ModelFolder, needed: set[str]) -> dict[str, tuple[Path, TensorEntry]]:
    """Return the tensors in the files that hold what is needed, after bringing those files here."""
    index = weight_map(folder.path)
    if index is None:
        folder.fetch(["model.safetensors"])
        return tensor_index(folder.path)
    stored = canonical_names(family_of(folder.config), list(index))
    files = sorted({index[stored[name]] for name in needed if name in stored})
    folder.fetch(files)
    return tensor_index(folder.path, [folder.path / name for name in files])
