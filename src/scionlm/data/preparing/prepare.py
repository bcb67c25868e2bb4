"""`scion prepare`: files of text become token shards, split by document, resumable at any kill.

    survey    read every document once; keep a hash and a size of each
    settle    decide which documents are held out, which are duplicates, how far limits reach
    tokenize  read again, and write shards unit by unit
    finish    statistics, tokenizer, and last the index, with which the folder is one

Surveying and tokenizing are done part by part, by as many processes as run the command on the same folder (`crew`).
Bytes do not depend on the number of workers, of processes or of stops.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scionlm.core.errors import DataError, ScionError, UsageError
from scionlm.core.files import folder_lock, require_free_folder, storage_error
from scionlm.core.log import say, warn
from scionlm.core.records import read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data.folder import DataFolder
from scionlm.data.preparing.crew import Crew
from scionlm.data.preparing.fates import is_settled, needed_parts, settle, settled
from scionlm.data.preparing.job import WORK, Job, Part
from scionlm.data.preparing.limits import limited, room_for
from scionlm.data.preparing.statistics import statistics
from scionlm.data.preparing.survey import is_surveyed, survey_part
from scionlm.data.preparing.tidy import clear, tidy
from scionlm.data.preparing.units import Tokenizing, is_tokenized, tokenize_part
from scionlm.data.reading.corpora import Corpora
from scionlm.data.reading.hub import hub_dataset
from scionlm.data.shards import TokenizerInfo
from scionlm.data.tokenizer import copy_tokenizer, tokenizer_info
from scionlm.sources import ModelFolder, load_tokenizer, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLAIM = "prepare.json"
_FAR = 3  # times the share that is to be held out, from which on it is worth a word


def prepare(corpora: Corpora, root: Path, out: Path, workers: int | None = None) -> dict[str, Any]:
    """Make the data folder `out`, or help others to make it, and return its index.

    Args:
        corpora: What to read.
        root: Folder that relative paths start from.
        out: The data folder: absent, empty, or an unfinished one of the same corpora.
        workers: Threads that tokenize; None takes all cores. The result does not depend on it.

    Raises:
        UsageError: `out` holds something else, or no tokenizer is named.
        DataError: A file is broken or a domain is empty.
        StorageError: The disk is full or not writable.
        StoppedError: A signal came; what is finished is kept.
    """
    if corpora.tokenizer is None:
        raise UsageError(
            "CORPORA.yaml names no tokenizer; add tokenizer: MODEL (or make one with scion train-tokenizer)"
        )
    beside = root / corpora.tokenizer  # where paths are looked for too; else as a MODEL from here
    try:
        source = resolve_tokenizer(str(beside) if beside.exists() else corpora.tokenizer)
    except UsageError as error:
        raise UsageError(f"tokenizer: {error} (looked for in {root}, then from the working directory)") from error
    tokenizer = load_tokenizer(source.path)
    tokenizer.encode_special_tokens = True  # words of a text that look like a special token are words
    info = tokenizer_info(tokenizer, source, corpora.separator, corpora.bos)
    job = Job.of(corpora, root, out)
    made = not out.exists()
    _claim(out, job.identity(info))
    if (out / "index.json").exists():
        say(f"{out} is prepared already; nothing to do")
        _warn_of_changes(job)
    else:
        with StopRequest() as stop:
            crew = Crew(out / WORK / "locks", stop, is_over=(out / "index.json").exists)
            try:
                _work(job, crew, Tokenizing(tokenizer, info, workers), source, stop)
            except (ScionError, OSError) as error:
                # Where another process has just finished and tidied up, there is nothing left to be found.
                if not (out / "index.json").exists():
                    # The text has to be mended, and is other text then: what was learnt of it is of no more use.
                    if isinstance(error, DataError | UsageError) and not is_settled(job) and crew.is_alone():
                        clear(out, whole=made)
                    raise
    tidy(out)
    return read_json(out / "index.json")


def warn_of_split(corpora: Corpora, index: dict[str, Any]) -> None:
    """Say where what is held out of a domain takes much of its text: few documents, or long ones.

    Args:
        corpora: What was asked for.
        index: What came of it.
    """
    asked = corpora.held_out
    for name, splits in index["domains"].items():
        out, trained = (splits[split]["num_tokens"] for split in ("held_out", "train"))
        share = out / (out + trained)
        if out > trained or share > _FAR * asked.fraction:
            more = "give more documents" if corpora.domains[name].max_tokens is None else "raise max_tokens"
            warn(
                f"domains.{name}: {out:,} of {out + trained:,} tokens are held out, {100 * share:.0f} % where "
                f"held_out.fraction is {100 * asked.fraction:g} %; lower held_out.min_documents ({asked.min_documents})"
                f", or {more}"
            )


def resolve_tokenizer(name: str) -> ModelFolder:
    """Return the folder of a tokenizer: a MODEL, or a folder that holds nothing but a tokenizer."""
    path = Path(name).expanduser()
    if (path / "tokenizer.json").is_file() and not (path / "config.json").exists():
        return ModelFolder(path=path, name=name, config={})
    return resolve(name, weights=False)


def _claim(out: Path, identity: str) -> None:
    """Make the folder, or find that it is one of the same job.

    Raises:
        UsageError: It holds other data.
        DataError: Its record is broken.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} exists and is not a folder; choose another path")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out) from error
    path = out / _CLAIM
    try:
        require_free_folder(out)  # before a lock file is put into somebody else's folder
    except UsageError:
        if not path.exists():  # asked last: all that a process puts there comes after its claim
            raise
    with folder_lock(out, wait=True):
        if not path.exists():
            require_free_folder(out)
            write_json(path, {"identity": identity})
    found = read_json(path).get("identity")
    if not isinstance(found, str):
        raise DataError(f"{path} is broken; remove {out} and prepare the data again")
    if found != identity:
        raise UsageError(
            f"{out} holds data of other corpora, settings or tokenizer; choose another folder or remove it"
        )


def _work(job: Job, crew: Crew, tokenizing: Tokenizing, source: ModelFolder, stop: StopRequest) -> None:
    parts = {part.name: part for mine in job.parts.values() for part in mine}
    crew.each(
        parts,
        is_done=lambda name: is_surveyed(parts[name]),
        work=lambda name: survey_part(job, parts[name], stop),
        is_needed=lambda name: parts[name].number < len(needed_parts(job, parts[name].domain)),
    )
    crew.each(["settle"], lambda _: is_settled(job), lambda _: settle(job))
    needed = {part.name: part for domain in job.parts for part in needed_parts(job, domain)}
    crew.each(
        needed,
        is_done=lambda name: is_tokenized(needed[name]),
        work=lambda name: tokenize_part(job, needed[name], tokenizing, stop, _room(job, needed[name])),
    )
    crew.each(["finish"], lambda _: False, lambda _: _finish(job, tokenizing.tokenizer, tokenizing.info, source))


def _changed(job: Job) -> dict[str, list[int]]:
    """Return when each file of each domain was changed last."""
    return {name: [file.changed_ns for part in parts for file in part.files] for name, parts in job.parts.items()}


def _warn_of_changes(job: Job) -> None:
    """Say where text has changed since it was prepared: of the same sizes, else it would be other corpora."""
    before = read_json(job.out / _CLAIM).get("changed_ns") or {}
    for name, now in _changed(job).items():
        if name in before and before[name] != now:
            warn(f"domains.{name}: files have changed since {job.out} was prepared; remove it to prepare them anew")


def _room(job: Job, part: Part) -> int:
    return room_for(part, job.parts[part.domain], job.domain(part).max_tokens)


def _finish(job: Job, tokenizer: "Tokenizer", info: TokenizerInfo, source: ModelFolder) -> None:
    """Write statistics, tokenizer and index; the folder is a data folder once the index is there."""
    facts = settled(job)
    domains: dict[str, Any] = {}
    limits: dict[str, str] = {}
    for name, config in job.corpora.domains.items():
        shards = limited(needed_parts(job, name), config.max_tokens, info)
        domains[name] = shards.totals(name)
        by_documents = config.max_documents is not None and facts[name]["documents_read"] >= config.max_documents
        if shards.is_cut:
            limits[name] = f"{config.max_tokens:,} training tokens"
        elif by_documents:
            limits[name] = f"{config.max_documents:,} documents"
        elif not facts[name]["all_read"]:
            warn(f"domains.{name}: the text that was read gives fewer tokens than max_tokens {config.max_tokens:,}")
    index = {"tokenizer": info.to_dict(), "domains": domains}
    named = {name: [hub_dataset(path) for path in config.paths] for name, config in job.corpora.domains.items()}
    datasets = {name: sorted({one for one in found if one}) for name, found in named.items()}
    if any(datasets.values()):
        index["hub_datasets"] = {name: found for name, found in datasets.items() if found}
    copy_tokenizer(source, job.out / "tokenizer")
    corpora = job.corpora
    kept = {
        "tokenizer": {key: index["tokenizer"][key] for key in ("name", "vocab_size", "separator", "bos", "dtype")},
        "held_out": corpora.held_out.model_dump(),
        "dedupe": corpora.dedupe.model_dump() if corpora.dedupe else None,
    }
    write_json(job.out / _CLAIM, read_json(job.out / _CLAIM) | {"changed_ns": _changed(job)})
    figures = statistics(DataFolder(job.out, index), tokenizer, facts, limits)
    write_json(job.out / "statistics.json", kept | {"domains": figures})
    write_json(job.out / "index.json", index)
