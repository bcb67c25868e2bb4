"""Cut a vocabulary: to that of another tokenizer, or to the first merges of the source's own; pad it to a multiple.

A byte-level BPE tokenizer lists its merges by how useful they were: leaving the last ones out gives a smaller tokenizer
that is as sound, and every token of it is one of the source's, with an embedding of its own.
"""

import json
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import write_text_atomic
from scionlm.families import ModelShape
from scionlm.sources.folder import load_tokenizer, read_json_object
from scionlm.surgery.plan import Indices


def match_tokenizer(source: Path, tokenizer: Path) -> Indices:
    """Return for each token of the tokenizer in `tokenizer` its id in that of `source`.

    Raises:
        DataError: Ids have gaps, or a token is not one of the source's.
    """
    known, wanted = load_tokenizer(source).get_vocab(), load_tokenizer(tokenizer).get_vocab()
    tokens = sorted(wanted, key=lambda token: wanted[token])
    if [wanted[token] for token in tokens] != list(range(len(tokens))):
        raise DataError(f"{tokenizer}: the tokenizer's ids have gaps; ids from 0 on without gaps are needed")
    missing = [token for token in tokens if token not in known]
    if missing:
        raise DataError(
            f"{tokenizer}: {len(missing)} of {len(tokens)} tokens are not the source's, {missing[0]!r} for one; "
            "only a tokenizer made of the source's own tokens can be trimmed to (--vocab-size makes one)"
        )
    return tuple(known[token] for token in tokens)


def trim_tokenizer(source: Path, size: int, out: Path) -> Indices:
    """Write a tokenizer of the source's first `size` tokens into `out`; return the source's id of each of them.

    All single bytes and characters and all added tokens stay; the merges that came last in training go. Added tokens
    that the source has no embedding for (Gemma 3's for images) go too.

    Args:
        source: Folder with the source's tokenizer, and the `config.json` that says how many embeddings there are;
            without that, each token has one.
        size: Tokens of the new tokenizer.
        out: Folder that gets `tokenizer.json` and what belongs to it.

    Raises:
        UsageError: `size` is not between the tokens that must stay and those there are.
        DataError: The tokenizer is not a BPE, or numbers tokens in a place that Scion does not know.
    """
    path = source / "tokenizer.json"
    load_tokenizer(source)  # what the library refuses is refused here
    spec = read_json_object(path)
    try:
        return _trim(spec, path, source, size, out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: its parts do not fit together ({type(error).__name__}: {error})") from error


def _trim(spec: dict[str, Any], path: Path, source: Path, size: int, out: Path) -> Indices:
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path}: only a BPE tokenizer can be trimmed; give a tokenizer instead (--tokenizer)")
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    listed, rows = spec.get("added_tokens") or [], _num_embeddings(source)
    gone = {token["content"] for token in listed if rows is not None and int(token["id"]) >= rows}
    spec["added_tokens"] = [token for token in listed if token["content"] not in gone]
    added = {token["content"]: int(token["id"]) for token in spec["added_tokens"]}
    ids = vocab | added
    made = {a + b for a, b in merges}
    kept = {token for token in ids if token in added or token not in made}
    if not len(kept) <= size <= len(ids):
        raise UsageError(f"vocab_size: {size} is not between {len(kept)}, the tokens that must stay, and {len(ids)}")
    before = -1
    while len(kept) < size and len(kept) != before:  # a merge may stand in front of the one that makes its part
        before = len(kept)
        for a, b in merges:
            if len(kept) < size and a in kept and b in kept and a + b in ids:
                kept.add(a + b)
    if len(kept) != size:
        raise DataError(f"{path}: only {len(kept)} tokens can be made of its merges")
    tokens = sorted(kept, key=lambda token: ids[token])
    new = {token: number for number, token in enumerate(tokens)}
    model["vocab"] = {token: new[token] for token in tokens if token in vocab}
    model["merges"] = [[a, b] for a, b in merges if a in kept and b in kept and a + b in kept]
    for token in spec["added_tokens"]:
        token["id"] = new[token["content"]]
    _renumber(spec.get("post_processor"), new, path)
    padding = spec.get("padding")
    if padding is not None:
        padding["pad_id"] = new[padding["pad_token"]]
    files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False)}
    files |= _settings(source, {ids[token]: number for token, number in new.items()}, gone)
    for name, text in files.items():
        write_text_atomic(out / name, text)
    return tuple(ids[token] for token in tokens)


def _num_embeddings(source: Path) -> int | None:
    path = source / "config.json"
    return ModelShape.of(read_json_object(path), path).vocab_size if path.is_file() else None


def _renumber(processor: Any, new: dict[str, int], path: Path) -> None:
    """Put new ids into a post-processor, which may add tokens by number."""
    if processor is None or processor.get("type") == "ByteLevel":
        return
    if processor.get("type") == "Sequence":
        for inner in processor["processors"]:
            _renumber(inner, new, path)
    elif processor.get("type") == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [new[token] for token in entry["tokens"]]
    else:
        raise DataError(
            f"{path}: post_processor {processor.get('type')!r} may hold token numbers; it cannot be trimmed"
        )


def _settings(source: Path, place: dict[int, int], gone: set[str]) -> dict[str, str]:
    """Return the files beside `tokenizer.json`, with token numbers brought into line and without tokens that went."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (source / name).is_file():
            continue
        settings = _without(read_json_object(source / name), gone)
        listed = settings.get("added_tokens_decoder")
        if isinstance(listed, dict):
            if not all(key.isascii() and key.isdigit() for key in listed):
                raise DataError(f"{source / name}: added_tokens_decoder has a key that is no number")
            settings["added_tokens_decoder"] = {str(place[int(k)]): v for k, v in listed.items() if int(k) in place}
        found[name] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    template = source / "chat_template.jinja"
    return found | ({template.name: template.read_text(encoding="utf-8")} if template.is_file() else {})


def _without(value: Any, gone: set[str]) -> Any:
    """Return settings without those that name a token of `gone`, which transformers would add again."""

    def stays(item: Any) -> bool:
        named = item.get("content") if isinstance(item, dict) else item
        return not isinstance(named, str) or named not in gone

    if isinstance(value, dict):
        return {key: _without(item, gone) for key, item in value.items() if stays(item)}
    return [_without(item, gone) for item in value if stays(item)] if isinstance(value, list) else value


def padding_to(size: int, multiple: int) -> int:
    """Return how many rows make a vocabulary of `size` a multiple.

    Raises:
        UsageError: The multiple is not a positive number.
    """
    if not 1 <= multiple <= 2**20:
        raise UsageError(f"pad_vocab_to: {multiple} must be a multiple such as 64")
    return -size % multiple
