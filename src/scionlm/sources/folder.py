"""A Hugging Face model folder, checked before anything large is loaded.

transformers trusts what a folder says: it follows `../` in an index, fills missing tensors with random numbers and a
printed note, and asks on a terminal whether to run the folder's own code. Here each of these is an error.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scionlm.core.errors import DataError
from scionlm.core.files import storage_error
from scionlm.core.log import warn
from scionlm.core.records import check_version
from scionlm.core.tensors import TensorEntry, read_header

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

_MAX_JSON = 64 * 2**20
# What old files hold beside weights: causal masks and rotary frequencies, which are computed.
_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|(^|\.)rotary_emb\.inv_freq$")
LICENSE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class ModelFolder:
    """A local folder in Hugging Face's layout and where it came from.

    Attributes:
        path: The folder.
        name: The model as the user named it.
        config: The parsed `config.json`.
        revision: The hub commit, when it came from the hub.
        license: Licence identifier, when one is stated.
        facts: More about the origin, for manifests (hashes, package versions).
        fetcher: Brings weight files that were left out at first; None where all are here.
    """

    path: Path
    name: str
    config: dict[str, Any]
    revision: str | None = None
    license: str | None = None
    facts: dict[str, Any] = field(default_factory=lambda: {})
    fetcher: Callable[[list[str]], None] | None = field(default=None, compare=False, repr=False)

    @property
    def base_model(self) -> str | None:
        """The hub id that a model made of this one names as its base: its own, or that of what Scion made it from."""
        if hub_id := self.facts.get("hub_id"):
            return str(hub_id)
        return stated(self.path, "base_model") if (self.path / "provenance.json").exists() else None

    def fetch(self, files: list[str] | None = None) -> None:
        """Bring weight files here, by name (None: all of them), where the model was resolved without them."""
        if self.fetcher is not None:
            index = weight_map(self.path)
            every = ["model.safetensors"] if index is None else sorted(set(index.values()))
            self.fetcher(every if files is None else files)

    def bytes_each(self) -> int:
        """Return the bytes of one weight: by the files where they are here, else by the configuration."""
        sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")
        if self.fetcher is not None:
            return sizes.get(stated, 4)
        kinds = Counter(entry.dtype for _, entry in tensor_index(self.path).values())
        return {"F64": 8, "F32": 4}.get(kinds.most_common(1)[0][0], 2)

    def license_files(self) -> list[Path]:
        """Return the licence, notice and policy files that must travel with the weights."""
        return sorted(p for pattern in LICENSE_PATTERNS for p in self.path.glob(pattern) if p.is_file())

    def weights_fingerprint(self) -> str:
        """Return a SHA-256 over the names and bytes of all weight files."""
        from scionlm.core.files import sha256_file

        digest = hashlib.sha256()
        for file in weight_files(self.path):
            digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
        return digest.hexdigest()

    def config_fingerprint(self) -> str:
        """Return a SHA-256 over the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Return a SHA-256 over all that decides what the model says: weights, configuration and tokenizer."""
        from scionlm.core.files import sha256_file

        tokenizer = self.path / "tokenizer.json"
        parts = [self.weights_fingerprint(), json.dumps(self.config, sort_keys=True)]
        parts += [sha256_file(tokenizer)] if tokenizer.is_file() else []
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file that others wrote.

    Raises:
        DataError: The file is absent, too large, not JSON or not a mapping.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise DataError(f"{path} has more than {_MAX_JSON} bytes: too large for its kind")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {path.parent} is not a Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise storage_error(error, path) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json`, refusing what Scion cannot cut up honestly.

    Raises:
        DataError: The file is broken, the model brings its own code, or its weights are quantized.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    if "auto_map" in config and not _is_known(config):
        raise DataError(f"{path}: the model needs its own code (auto_map); Scion runs no code from a model folder")
    if config.pop("auto_map", None):
        warn(f"{path}: transformers has {config['model_type']} models itself; the code that auto_map names is not run")
    if config.get("quantization_config"):
        raise DataError(f"{path}: the weights are quantized (quantization_config); use the unquantized model")
    if not isinstance(config.get("model_type"), str):
        raise DataError(f"{path}: model_type is missing")
    return config


def _is_known(config: dict[str, Any]) -> bool:
    """Return whether the classes that `auto_map` names are by now transformers' own for this type, as Phi-3's are."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, named = config.get("model_type"), config["auto_map"]
    if not isinstance(kind, str) or not isinstance(named, dict):
        return False
    own = {
        "AutoConfig": CONFIG_MAPPING_NAMES.get(kind),
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
    }
    return all(name is not None and str(named.get(key)).rpartition(".")[2] == name for key, name in own.items())


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the index of a sharded model: tensor to file name; None where all tensors are in `model.safetensors`.

    Raises:
        DataError: The index is broken, or names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise DataError(f"{index}: weight_map is missing or not a mapping of tensor to file")
    for name in sorted(set(found.values())):
        # A hub cache links each file to a blob outside the folder: the name must stay inside, the link may not.
        if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
            raise DataError(f"{index}: {name!r} leaves the model folder; refusing to follow it")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder in order.

    Raises:
        DataError: There are none, or the index names files that are missing or outside the folder.
    """
    index = weight_map(folder)
    if index is None:
        single = folder / "model.safetensors"
        if not single.exists():
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            advice = f"; {pickled[0]} is a pickle: --allow-pickle converts it once" if pickled else ""
            raise DataError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{advice}")
        return [single]
    files = [folder / name for name in sorted(set(index.values()))]
    for path in files:
        if not path.is_file():
            raise DataError(
                f"{folder}/model.safetensors.index.json names {path.name}, which is not in the folder; "
                "the download is incomplete"
            )
    return files


def tensor_index(folder: Path, files: list[Path] | None = None) -> dict[str, tuple[Path, TensorEntry]]:
    """Return every tensor of a model folder: name to (file, entry of its header).

    Args:
        folder: The folder.
        files: Look at these of its weight files only; None takes all.

    Raises:
        DataError: A file is broken, a tensor stands twice, or the index promises a tensor that is not there.
    """
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for file in weight_files(folder) if files is None else files:
        for name, entry in read_header(file, "fetch it again")[0].items():
            if name in tensors:
                raise DataError(f"tensor {name!r} is in both {tensors[name][0].name} and {file.name} of {folder}")
            tensors[name] = (file, entry)
    if not tensors:
        raise DataError(f"{folder}: its weight files hold no tensors")
    for name, file_name in (weight_map(folder) or {}).items():
        looked_at = files is None or folder / file_name in files
        if looked_at and (name not in tensors or tensors[name][0].name != file_name):
            raise DataError(f"{folder}: the index promises tensor {name!r} in {file_name}, which does not hold it")
    return tensors


def stated(folder: Path, key: str) -> str | None:
    """Return what the front matter of a folder's model card says of a key, as `license`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from scionlm.core.config import parse_yaml
    from scionlm.core.errors import UsageError

    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        front = parse_yaml(text[3:].split("\n---", 1)[0], str(card))
    except UsageError:
        return None
    value = front.get(key) if isinstance(front, dict) else None
    return value if isinstance(value, str) else None


def open_folder(
    path: Path, name: str | None = None, fetcher: Callable[[list[str]], None] | None = None, **facts: Any
) -> ModelFolder:
    """Return the model folder at `path` after reading its configuration.

    Raises:
        DataError: The folder is not a model that Scion can use.
    """
    origin = path / "scion_origin.json"  # beside converted weights: what they were made from
    if origin.exists():
        facts = check_version(read_json_object(origin), origin) | facts
    return ModelFolder(
        path=path,
        name=name or str(path),
        config=read_config(path),
        revision=facts.pop("revision", None),
        license=facts.pop("license", None) or stated(path, "license"),
        facts=facts,
        fetcher=fetcher,
    )


def load_hf_model(
    folder: ModelFolder, dtype: "torch.dtype | None" = None, attn_implementation: str | None = None
) -> "PreTrainedModel":
    """Load a folder as a transformers model in evaluation mode; every tensor must be there.

    Args:
        folder: The model.
        dtype: Type of the weights; None keeps the stored one.
        attn_implementation: transformers' name of the attention kernel; None leaves the choice to it.

    Raises:
        DataError: The weights do not fit the configuration.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from scionlm.sources.quiet import quiet_transformers

    tensor_index(folder.path)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=dtype or "auto",
                attn_implementation=attn_implementation,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        model, report = loaded
    except (ValueError, KeyError, RuntimeError, TypeError, SafetensorError, StrictDataclassError, OSError) as error:
        raise DataError(f"{folder.path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report.get(kind) or ()))
        if kind == "unexpected_keys":
            keys = [key for key in keys if not _BUFFERS.search(key)]
        if keys:
            raise DataError(f"{folder.path}: {kind.replace('_', ' ')}: {', '.join(keys[:3])} ({len(keys)} in all)")
    return model.eval()


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Return the fast tokenizer in `tokenizer.json`.

    Raises:
        DataError: The file is missing or broken.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; Scion needs a fast tokenizer (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        # A file can ask for texts to be cut or padded; no text that Scion reads may be.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{path} is not a usable tokenizer: {error}") from error
