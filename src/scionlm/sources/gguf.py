"""GGUF in: a quantized llama.cpp file becomes a float32 Hugging Face folder, once, in a cache.

The mapping of names and the dequantization are those of transformers and gguf.
"""

import os
import shutil
import struct
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.core.files import sha256_file, staged_folder, storage_error, write_text_atomic
from scionlm.core.log import say

# Part of the cache key: raise it when a conversion would come out different.
_CONVERSION = 1
_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")


def cache_root() -> Path:
    """Return the folder for converted models: `$XDG_CACHE_HOME/scionlm` or `~/.cache/scionlm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scionlm"


def convert_gguf(file: Path, license_folder: Path) -> Path:
    """Return the Hugging Face folder for a GGUF file, converting it if the cache does not hold it yet.

    Args:
        file: The GGUF file.
        license_folder: Folder whose licence files travel along.

    Raises:
        DataError: The file is broken, or the `gguf` package is not installed.
        StorageError: The cache cannot be written.
    """
    try:
        with file.open("rb") as handle:
            magic = handle.read(8)
    except OSError as error:
        raise storage_error(error, file) from error
    if len(magic) < 8 or magic[:4] != b"GGUF" or struct.unpack("<I", magic[4:])[0] not in (2, 3):
        raise DataError(f"{file} is not a GGUF file of version 2 or 3")
    digest = sha256_file(file)
    out = cache_root() / f"gguf-{digest[:16]}-{_CONVERSION}"
    if not (out / "scion_origin.json").exists():
        if out.exists():
            raise DataError(f"{out} is not a complete conversion; remove that folder and try again")
        try:
            with staged_folder(out) as stage:
                _convert(file, stage, license_folder, digest)
        except (StorageError, UsageError):
            if not (out / "scion_origin.json").exists():  # else another process was faster: its result is as good
                raise
    return out


def _convert(file: Path, stage: Path, license_folder: Path, digest: str) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DataError(f"{file} needs the gguf package; pip install 'scionlm[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from scionlm.core.records import to_json
    from scionlm.sources.folder import LICENSE_PATTERNS
    from scionlm.sources.quiet import quiet_transformers

    broken = f"{file} is a broken or unsupported GGUF file"
    try:
        reader = GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        stated = reader.fields.get("general.license")
        types = sorted({t.tensor_type.name for t in reader.tensors})
        architecture = str(reader.fields["general.architecture"].contents())
        # Without these transformers would fill in its defaults, in silence.
        lacking = [key for key in _NEEDED if f"{architecture}.{key}" not in reader.fields]
    except Exception as error:  # the reader has no exceptions of its own: a broken file fails anywhere
        raise DataError(f"{broken} ({error}); fetch it again") from error
    if end == 0 or end > file.stat().st_size:
        raise DataError(f"{broken}: cut short; fetch it again")
    if lacking:
        raise DataError(f"{broken}: it lacks {architecture}.{lacking[0]}")
    say(f"converting {file.name} to float32, once, into {cache_root()}")
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                # The default keeps packed blocks where it can, and then refuses to be saved.
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            model, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        except Exception as error:  # as above: broken values surface as whatever they break
            raise DataError(f"{broken}: {' '.join(str(error).split())[:300]}") from error
        absent = [key for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()]
        if absent:
            raise DataError(f"{broken}: it lacks tensor {sorted(map(str, absent))[0]!r} ({len(absent)} in all)")
        model.config._name_or_path = ""
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    for pattern in LICENSE_PATTERNS:
        for path in license_folder.glob(pattern):
            shutil.copyfile(path, stage / path.name)
    origin = {
        "license": str(stated.contents()) if stated else None,
        "gguf_file": file.name,
        "gguf_sha256": digest,
        "quantization": f"{', '.join(types)}, dequantized to float32",
    }
    write_text_atomic(stage / "scion_origin.json", to_json(origin) + "\n")
