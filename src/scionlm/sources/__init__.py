"""Where a model comes from: MODEL as a user types it becomes a local, checked Hugging Face folder.

A folder, a hub id, a `.gguf` file or the built-in name; weights that are not safetensors are converted once.
"""

from scionlm.sources.folder import (
    ModelFolder,
    load_hf_model,
    load_tokenizer,
    open_folder,
    read_config,
    tensor_index,
)
from scionlm.sources.resolve import BUILTIN, resolve

__all__ = [
    "BUILTIN",
    "ModelFolder",
    "load_hf_model",
    "load_tokenizer",
    "open_folder",
    "read_config",
    "resolve",
    "tensor_index",
]
