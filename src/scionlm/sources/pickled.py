"""Foreign `.bin` weights in: the one place where a pickle is opened, and only when the user says so.

`torch.load(weights_only=True)` builds tensors and plain containers and nothing else. The result is converted once into
a folder of safetensors in the cache; from then on a local folder loads from there, without the flag.
"""

import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.core.files import sha256_file, staged_folder, write_text_atomic
from scionlm.core.log import say
from scionlm.sources.gguf import cache_root

_COPIED = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def convert_pickled(folder: Path, allowed: bool) -> Path:
    """Return `folder`, or its conversion where its only weights are `pytorch_model*.bin`.

    Args:
        folder: A model folder.
        allowed: Whether the user said that pickles may be opened.

    Raises:
        DataError: Opening is not allowed, or a file is no mapping of names to tensors.
        StorageError: The cache cannot be written.
    """
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files or any(folder.glob("*.safetensors")):
        return folder
    digest = hashlib.sha256()
    for file in [*files, *_copied(folder)]:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    out = cache_root() / f"bin-{digest.hexdigest()[:16]}"
    if not (out / "scion_origin.json").exists():
        if not allowed:
            raise DataError(
                f"{files[0]} is a pickle, which can hold code; --allow-pickle converts it once, with weights_only"
            )
        try:
            with staged_folder(out) as stage:
                _convert(folder, files, stage, digest.hexdigest())
        except (StorageError, UsageError):
            if not (out / "scion_origin.json").exists():  # else another process was faster: its result is as good
                raise
    return out


def _copied(folder: Path) -> list[Path]:
    """Return what a conversion takes along as it is."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def _convert(folder: Path, files: list[Path], stage: Path, digest: str) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    from scionlm.core.records import to_json

    say(f"converting {len(files)} .bin files of {folder} to safetensors, once, into {cache_root()}")
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        try:
            mappable = zipfile.is_zipfile(file)  # files of before torch 1.6 are none
            state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
        except Exception as error:  # unpickling fails in many ways; the file is to blame for all of them
            raise DataError(
                f"{file} cannot be opened with weights_only: {' '.join(str(error).split())[:200]}"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise DataError(f"{file} is no mapping of names to tensors")
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        doubled = sorted(set(weight_map) & set(state))
        if doubled:
            raise DataError(f"{file}: tensor {doubled[0]!r} is in {weight_map[doubled[0]]} too")
        # Tied tensors share memory in a pickle; in safetensors each stands for itself.
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, stage / name, {"format": "pt"})
        weight_map |= dict.fromkeys(state, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        write_text_atomic(stage / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    for path in _copied(folder):
        shutil.copyfile(path, stage / path.name)
    origin = {"license": None, "converted_from": "pickle", "pickle_sha256": digest}
    write_text_atomic(stage / "scion_origin.json", to_json(origin) + "\n")
