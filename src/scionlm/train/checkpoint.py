"""Checkpoints: complete or absent, safetensors and JSON only, each with a SHA-256 of every file.

RUN/checkpoints/step-00000120/
    weights.safetensors     float32 weights
    optimizer.safetensors   moments and step of each weight
    average.safetensors     averaged weights, where there are some
    projections.safetensors what is trained beside the model, where there is something
    gates.safetensors       gates, multipliers and their optimizers' states, where masks are learned
    shards/                 all of these instead, where the ranks share the weights out: a file from each
    state.json              step, stage, schedule, tokens, cursors of the sample plan, random state
    manifest.json           SHA-256 of the others; whether it is kept for good
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.core.files import remove_folder, remove_leftovers, settle, sha256_file, staged_folder, storage_error
from scionlm.core.log import format_bytes, warn
from scionlm.core.records import FORMAT_VERSION, Record, check_version, read_json, write_json
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.train.folders import checkpoint_folders, folder_name
from scionlm.train.shards import InFile, InShards, Saved, Tensors, matching, write_shards

_STATE, _MANIFEST, _SHARDS, _SUFFIX = "state.json", "manifest.json", "shards", ".safetensors"
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_ROOM = 1.05  # of the tensors' bytes: headers, and what a file system wastes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written.

    Attributes:
        path: Its folder.
        state: What is not a tensor.
    """

    path: Path
    state: Record

    def saved(self, name: str) -> Saved:
        """Return the tensors saved as `name`; none where there were none."""
        if (self.path / _SHARDS).is_dir():
            return InShards(self.path / _SHARDS, name)
        return InFile(self.path / f"{name}{_SUFFIX}")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors saved as `name`, whole, in float32."""
        saved = self.saved(name)
        found = {one: torch.empty(shape) for one, shape in saved.shapes.items()}
        saved.fill(found)
        return found

    def load_weights(self, model: torch.nn.Module) -> None:
        """Put the weights into a model.

        Raises:
            DataError: They are of another model.
        """
        self.load_into(dict(model.named_parameters()), "weights")

    def load_into(self, parameters: Mapping[str, torch.nn.Parameter], name: str) -> None:
        """Put the tensors saved as `name` into parameters of the same names.

        Raises:
            DataError: They are of another model.
        """
        matching(self.saved(name), {one: parameter.detach() for one, parameter in parameters.items()}, str(self.path))


def _seal(stage: Path, state: Record, hashes: dict[str, str], for_good: bool) -> None:
    """Write what makes files a checkpoint: state and manifest."""
    write_json(stage / _STATE, state)
    hashes = {name: hashes[name] for name in sorted(hashes)} | {_STATE: sha256_file(stage / _STATE)}
    manifest = {"format_version": FORMAT_VERSION, "for_good": for_good, "sha256": dict(sorted(hashes.items()))}
    write_json(stage / _MANIFEST, manifest | {"digest": _digest(manifest)})


def open_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint after comparing every file with its hash.

    Raises:
        DataError: A file is damaged, missing or one too many.
    """
    problems = find_damage(path)
    if problems:
        raise DataError(f"checkpoint {path} is damaged ({', '.join(problems)})")
    return Checkpoint(path, read_json(path / _STATE))


def find_damage(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint's files; nothing where they are what was written.

    Raises:
        DataError: A newer Scion wrote it.
        StorageError: It cannot be read.
    """
    try:
        text = (path / _MANIFEST).read_text(encoding="utf-8")
        manifest: Record = json.loads(text)
        if _is_newer(manifest):
            check_version(manifest, path / _MANIFEST)
        if not _is_whole(manifest, text):
            return [_MANIFEST]
        expected = manifest["sha256"]
        found = {entry.relative_to(path).as_posix() for entry in path.rglob("*")} - {_MANIFEST}
        found -= {_SHARDS} if any(name.startswith(f"{_SHARDS}/") for name in expected) else set()
        unknown = [f"{name} does not belong there" for name in sorted(found - set(expected))]
        damaged = [n for n in expected if n not in found or sha256_file(path / n) != expected[n]]
    except (*_MISSING, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{_MANIFEST} ({error})"]
    except OSError as error:  # nothing is known of the files: a disk that comes back may have them whole
        raise storage_error(error, path) from error
    if not damaged:
        step = read_json(path / _STATE).get("step")
        if not isinstance(step, int) or path.name != folder_name(step):
            return ["it is the checkpoint of another step"]
    return unknown + damaged


def _is_newer(manifest: Record) -> bool:
    """Return whether a manifest is of a later format, rather than one of ours whose version is damaged."""
    version = manifest["format_version"]
    as_ours = _digest(manifest | {"format_version": FORMAT_VERSION})
    return isinstance(version, int) and version > FORMAT_VERSION and manifest.get("digest") != as_ours


def _is_whole(manifest: Record, text: str) -> bool:
    """Return whether a manifest is as it was written."""
    if _STATE not in manifest["sha256"] or text != json.dumps(manifest, indent=2, ensure_ascii=False) + "\n":
        return False
    if "for_good" not in manifest and "digest" not in manifest:
        return manifest["format_version"] == FORMAT_VERSION  # of before there was a digest
    return manifest.get("digest") == _digest(manifest)


def _digest(manifest: Record) -> str:
    """Return a hash of a manifest's own entries: what tells a damaged manifest."""
    entries = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        folder: Where they are.
        keep: How many of the newest stay, beside those that are kept for good.
        ranks: The processes that save together, on lines of their own where they save in the background.
        shared: Whether each has a part of the tensors.
    """

    folder: Path
    keep: int
    ranks: Ranks = ALONE
    shared: bool = False

    def save(self, state: Record, tensors: Mapping[str, Tensors], for_good: bool = False) -> Path:
        """Write the checkpoint of `state["step"]` and remove those that are too old. All ranks have to call.

        Args:
            state: What is not a tensor.
            tensors: Name of each file to what goes into it; an empty one is left out.
            for_good: Never remove it.

        Raises:
            StorageError: It cannot be written; the older ones are left in place.
        """
        out = self.folder / folder_name(state["step"])
        if self.ranks.on_main(out.exists):
            return out
        if self.shared:
            self._save_shares(out, state, tensors, for_good)
        else:
            self.ranks.on_main(lambda: self._save_whole(out, state, tensors, for_good))
        self.ranks.on_main(self._remove_old)
        return out

    def _save_whole(self, out: Path, state: Record, tensors: Mapping[str, Tensors], for_good: bool) -> None:
        held = {name: {k: v.detach().cpu().contiguous() for k, v in some.items()} for name, some in tensors.items()}
        self._require_room(sum(t.nbytes for some in held.values() for t in some.values()))
        with staged_folder(out) as stage:
            for name, some in held.items():
                if some:
                    save_file(some, stage / f"{name}{_SUFFIX}")
            _seal(stage, state, {path.name: sha256_file(path) for path in stage.iterdir()}, for_good)

    def _save_shares(self, out: Path, state: Record, tensors: Mapping[str, Tensors], for_good: bool) -> None:
        def begin() -> str:
            self._require_room(sum(t.nbytes for some in tensors.values() for t in some.values()))
            stage = Path(opened.enter_context(staged_folder(out)))
            (stage / _SHARDS).mkdir()
            return str(stage)

        def write() -> dict[str, str]:
            write_shards(stage / _SHARDS, tensors, self.ranks.group)
            mine = sorted((stage / _SHARDS).glob(f"shard-{self.ranks.rank + 1:05d}-*"))
            try:
                for path in mine:
                    settle(path)
                return {f"{_SHARDS}/{path.name}": sha256_file(path) for path in mine}
            except OSError as error:
                raise storage_error(error, out) from error

        with contextlib.ExitStack() as opened:  # on the main rank alone there is something to close
            stage = Path(self.ranks.on_main(begin))
            hashes = self.ranks.gather(self.ranks.together(write))

            def finish() -> None:
                _seal(stage, state, {name: value for some in hashes for name, value in some.items()}, for_good)
                opened.close()

            self.ranks.on_main(finish)

    def _require_room(self, num_bytes: int) -> None:
        there = self.folder
        while not there.exists():
            there = there.parent
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            raise storage_error(error, self.folder) from error
        if free < num_bytes * _ROOM:
            raise StorageError(
                f"cannot write a checkpoint into {self.folder}: it needs {format_bytes(int(num_bytes * _ROOM))}, "
                f"{format_bytes(free)} are free; free some space and run the same command again"
            )

    def _remove_old(self) -> None:
        passing = [path for path in self.all() if not _is_for_good(path)]
        for old in passing[: -self.keep]:
            remove_folder(old)

    def all(self) -> list[Path]:
        """Return the folders of the checkpoints, oldest first."""
        return [path for _, path in checkpoint_folders(self.folder)]

    def newest(self) -> Checkpoint | None:
        """Return the newest sound checkpoint; None where there is none. A damaged one is named and moved aside."""
        found = self.ranks.on_main(self._newest)
        return Checkpoint(Path(found), read_json(Path(found) / _STATE)) if found else None

    def _newest(self) -> str | None:
        remove_leftovers(self.folder, "step-")
        every = self.all()
        for path in reversed(every):
            problems = find_damage(path)
            if not problems:
                return str(path)
            then = "going back to the one before" if path != every[0] else "there is none before it: beginning anew"
            warn(f"checkpoint {path} is damaged ({', '.join(problems)}); {then}")
            aside = path.with_name(f"damaged-{path.name}")  # its place must be free for the step to be saved again
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return None


def _is_for_good(path: Path) -> bool:
    try:
        return bool(read_json(path / _MANIFEST).get("for_good"))
    except DataError:
        return False  # damaged: it goes when its turn comes
    except StorageError:
        return True  # what cannot be read now is not taken away


def find_checkpoint(place: Path, step: int | None = None) -> Checkpoint:
    """Return a checkpoint of a run, by the run's folder or its own.

    Args:
        place: RUN or RUN/checkpoints/step-N.
        step: Which; None takes the newest.

    Raises:
        UsageError: There is none, or not of that step.
        DataError: It is damaged.
    """
    if (place / _STATE).is_file():
        found = open_checkpoint(place)
        if step is not None and step != found.state["step"]:
            raise UsageError(f"{place} is the checkpoint of step {found.state['step']}, not of {step}; name the run")
        return found
    found = dict(checkpoint_folders(place / "checkpoints"))
    if not found:
        raise UsageError(f"{place} is neither a run folder with checkpoints nor a checkpoint")
    if step is not None and step not in found:
        raise UsageError(f"{place} has no checkpoint of step {step} (has: {', '.join(map(str, found))})")
    return open_checkpoint(found[max(found) if step is None else step])
