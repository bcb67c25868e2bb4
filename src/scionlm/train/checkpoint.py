"""Checkpoints: complete or absent, safetensors and JSON only, each with a SHA-256 of every file.

RUN/checkpoints/step-00000120/
    weights.safetensors     float32 weights
    optimizer.safetensors   moments and step of each weight
    state.json              step, tokens, cursors of the sample plan, random state
    manifest.json           SHA-256 of the three
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scionlm.core.errors import DataError
from scionlm.core.files import sha256_file, staged_folder
from scionlm.core.log import warn
from scionlm.core.records import read_json, write_json
from scionlm.train.objective import Objective

_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        folder: Where they are.
        keep: How many of the newest stay.
    """

    folder: Path
    keep: int

    def save(self, objective: Objective, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `state["step"]` and remove those that are too old.

        Raises:
            StorageError: It cannot be written; the older ones are left in place.
        """
        out = self.folder / f"step-{state['step']:08d}"
        if out.exists():
            return out
        names = [name for name, _ in objective.model.named_parameters()]
        weights = {name: p.detach().cpu().contiguous() for name, p in objective.model.named_parameters()}
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in objective.model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = value.detach().cpu().contiguous()
        with staged_folder(out) as stage:
            save_file(weights, stage / "weights.safetensors")
            save_file(moments, stage / "optimizer.safetensors")
            random = torch.get_rng_state().numpy().tobytes().hex()
            write_json(stage / "state.json", state | {"parameters": names, "torch_rng": random})
            write_json(stage / "manifest.json", {"sha256": {name: sha256_file(stage / name) for name in _FILES}})
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return out

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def load_latest(self, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the newest sound checkpoint into model and optimizer and return its state; None where there is none.

        A damaged one is named and passed over.

        Raises:
            DataError: A checkpoint is of another model.
        """
        for leftover in self.folder.glob(".step-*.tmp") if self.folder.is_dir() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self._all()):
            try:
                expected = read_json(path / "manifest.json")["sha256"]
                damaged = [n for n in _FILES if not (path / n).exists() or sha256_file(path / n) != expected.get(n)]
            except (DataError, KeyError) as error:
                damaged = [f"manifest.json ({error})"]
            if damaged:
                warn(f"checkpoint {path} is damaged ({', '.join(damaged)}); going back to the one before")
                aside = path.with_name(f"damaged-{path.name}")  # its place must be free for the step to be saved again
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                continue
            return self._load(path, objective, optimizer)
        return None

    def _load(self, path: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = read_json(path / "state.json")
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        parameters = dict(objective.model.named_parameters())
        if set(weights) != set(parameters):
            raise DataError(f"{path} is a checkpoint of another model")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        for key, value in moments.items():
            name, field = key.rsplit("/", 1)
            optimizer.state[parameters[name]][field] = value.to(parameters[name].device) if value.ndim else value
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch_rng"]), dtype=torch.uint8))
        return state
