"""Three small languages over the same words: text that a tiny model learns in seconds, with a floor that is known."""

import json
import random

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

LANGUAGES, NUM_WORDS, FOLLOWERS = ("first", "second", "third"), 60, (0.75, 0.2, 0.05)


def corpora_of_languages(folder, seed):
    """Write as many Markov chains over the same words as there are languages; return their CORPORA.yaml.

    Each word has followers of its own in each language, so that a model has to see which one it reads.
    """
    end = "<|endoftext|>"
    vocabulary = {end: 0} | {f"w{number}": 1 + number for number in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"bos_token": end, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    for name in LANGUAGES:
        rng = random.Random(f"{seed} {name}")
        chain = [rng.sample(range(NUM_WORDS), len(FOLLOWERS)) for _ in range(NUM_WORDS)]
        lines = []
        for _ in range(100):
            words = [rng.randrange(NUM_WORDS)]
            for _ in range(300):
                words += rng.choices(chain[words[-1]], FOLLOWERS)
            lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer": "tokenizer",
        "domains": {name: {"paths": [f"{name}.jsonl"]} for name in LANGUAGES},
        "held_out": {"fraction": 0.1, "min_documents": 10},
    }
    (folder / "corpora.yaml").write_text(yaml.safe_dump(config))
    return folder / "corpora.yaml"


def nats(domains):
    """Return the mean over the languages."""
    assert set(domains) == set(LANGUAGES)
    return sum(loss["nll"] for loss in domains.values()) / len(domains)
