"""`scion train-tokenizer`: a byte-level BPE tokenizer of any size on one's own domains.

Digits stand alone, as in the families that surgery knows best; no text is unknown, because every byte is a token. Each
domain gives the same number of bytes at most, so that a large one does not decide alone.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import staged_folder, write_text_atomic
from scionlm.core.log import Progress, warn
from scionlm.core.signals import StopRequest
from scionlm.data.preparing.job import Job
from scionlm.data.reading.corpora import Corpora

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_LONGEST_WORD = 64  # characters; longer runs without a space are no words, and cost quadratic time


def train_tokenizer(
    corpora: Corpora, root: Path, out: Path, vocab_size: int, special: tuple[str, ...] = (), max_bytes: int = 10**8
) -> int:
    """Train a tokenizer on the domains of a CORPORA.yaml, write it to `out`, and return its size.

    Args:
        corpora: Which files; limits on documents hold, limits on tokens have no meaning yet.
        root: Folder that relative paths start from.
        out: Folder for the tokenizer: absent or empty.
        vocab_size: Tokens, bytes and special tokens included; fewer where the text has no more to merge.
        special: Special tokens beside the end of text.
        max_bytes: Text taken from each domain at most.

    Raises:
        UsageError: The size leaves no room beyond the bytes, or a special token is named twice.
        DataError: The files hold no text, or a document cannot be used.
        StoppedError: A signal came; nothing is left behind.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [END_OF_TEXT, *special]
    if len(set(specials)) < len(specials) or "" in specials:
        raise UsageError(f"special tokens must differ and not be empty: {specials}")
    if vocab_size <= _BYTES + len(specials):
        raise UsageError(
            f"vocab_size {vocab_size} must be larger than {_BYTES + len(specials)}, one for each byte and special token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rf"\S{{{_LONGEST_WORD}}}"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with staged_folder(out) as stage, StopRequest() as stop:
        tokenizer.train_from_iterator(_texts(Job.of(corpora, root, out), max_bytes, stop), trainer)
        tokenizer.save(str(stage / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        write_text_atomic(stage / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size < vocab_size:
        warn(
            f"vocab_size {vocab_size:,} is not reached: the text gives {size:,} tokens only; add text, or ask for fewer"
        )
    return size


def _texts(job: Job, max_bytes: int, stop: StopRequest) -> Iterator[str]:
    """Yield the texts of each domain up to the limit."""
    found = False
    for name, parts in job.parts.items():
        documents = (one for part in parts for one in job.reader(part, quiet=False).read(part.files))
        left = max_bytes
        with Progress(f"reading {name}", max_bytes) as progress:
            for document in islice(documents, job.corpora.domains[name].max_documents):
                stop.check()
                found = True
                yield document.text
                left -= len(document.text.encode())
                progress.update(max_bytes - left)
                if left <= 0:
                    break
    if not found:
        raise DataError("the files of the domains hold no text to train a tokenizer on")
