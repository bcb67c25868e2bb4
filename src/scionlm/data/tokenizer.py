"""Which tokenizer made a data folder, and which of its special tokens stand where."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import sha256_file, staged_folder
from scionlm.data.shards import TokenizerInfo
from scionlm.sources import ModelFolder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names under which tokenizers have their end of text: a chat model's eos is end of turn, and is none of them.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS_TOKEN>")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_info(
    tokenizer: "Tokenizer", source: ModelFolder, separator: str | None, bos: str | None = None
) -> TokenizerInfo:
    """Return the facts about a tokenizer that a data folder records.

    Args:
        tokenizer: The tokenizer.
        source: The model folder it came from.
        separator: The token to put after each document; None takes the tokenizer's own end of text.
        bos: The token to put before each document; None puts none.

    Raises:
        UsageError: The asked separator or BOS is not a token.
        DataError: The tokenizer has no end of text of a known name.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = _special_tokens(source.path)
    if separator is None:
        separator = _end_of_text(tokenizer, special.get("eos_token"))
        if separator is None:
            raise DataError(f"the tokenizer of {source.name} has no end-of-text token of a known name; set separator")
    for key, token in (("separator", separator), ("bos", bos)):
        if token is not None and token not in vocabulary:
            raise UsageError(f"{key} {token!r} is not a token of {source.name}{nearest(token, list(vocabulary))}")
    prefix = special.get("bos_token") or special.get("eos_token") or separator
    return TokenizerInfo(
        name=source.name,
        sha256=sha256_file(source.path / "tokenizer.json"),
        vocab_size=max(vocabulary.values()) + 1,
        separator=separator,
        separator_id=vocabulary[separator],
        prefix_id=vocabulary.get(prefix, vocabulary[separator]),
        bos=bos,
        bos_id=None if bos is None else vocabulary[bos],
    )


def largest_id(tokenizer: "Tokenizer", info: TokenizerInfo) -> int:
    """Return the largest token id that a data folder can hold.

    A tokenizer may have special tokens that its model has no embedding for, as Gemma 3 has one for images: preparing
    reads no special token out of a text, and so needs none but those that it puts beside it.

    Args:
        tokenizer: The folder's.
        info: What the folder says of it.
    """
    read = {number for number, token in tokenizer.get_added_tokens_decoder().items() if not token.special}
    read |= set(tokenizer.get_vocab(with_added_tokens=False).values())
    return max(*read, info.separator_id, info.prefix_id, info.bos_id or 0)


def _end_of_text(tokenizer: "Tokenizer", eos: str | None) -> str | None:
    """Return a tokenizer's end of text: its eos, unless only another token has a name of one.

    Names that are ordinary tokens come last: Gemma has `</s>` as a tag of HTML, OPT the end of GPT-2's texts, unused.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    named = sorted(_END_OF_TEXT, key=lambda token: (token != eos, token not in special))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return next((token for token in [*named, eos] if token in vocabulary), None)


def _special_tokens(folder: Path) -> dict[str, Any]:
    """Return `bos_token` and `eos_token` as text, as far as the folder names them."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise DataError(f"{path} must hold a JSON object")
        for key in ("bos_token", "eos_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def copy_tokenizer(source: ModelFolder, out: Path) -> None:
    """Copy the tokenizer's files into a data folder, where they serve evaluation and export."""
    if out.exists():
        return
    with staged_folder(out) as stage:
        for name in _FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, stage / name)
