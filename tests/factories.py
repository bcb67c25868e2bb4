"""Tiny models, tokenizers and texts, made on the spot: no network, no downloads."""

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

_TEXT = (
    "the of and to in is was that for it with as his on be at by he had not are but from or have an they "
    "which one you were all her she there would their we him been has when who will no more if out so up "
    "into them than some its time"
)
WORDS = _TEXT.split()
VOCAB_SIZE = 320


def text(seed: int, num_words: int) -> str:
    """Return words in an order that has some structure to learn."""
    rng = random.Random(seed)
    words, at = [], rng.randrange(len(WORDS))
    for _ in range(num_words):
        at = (at * 3 + rng.choice((1, 2))) % len(WORDS)
        words.append(WORDS[at])
    return " ".join(words)


def tiny_config(family: str = "llama", **changes) -> LlamaConfig:
    """Return a configuration with grouped-query attention and an untypical head size."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return (LlamaConfig if family == "llama" else MistralConfig)(**(sizes | changes))


def tiny_model(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """Return a tiny model with random weights; biases and norm gains are random too, so that losing one shows."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = (LlamaForCausalLM if family == "llama" else MistralForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4.0)  # large enough that each layer matters to the logits
    return model


def tiny_tokenizer(folder: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer in place, with `<|endoftext|>` as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(0, 3000)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return tokenizer


def model_folder(folder: Path, **changes) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer(folder)
    (folder / "LICENSE").write_text("Test licence\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    return folder


def corpora_file(folder: Path, tokenizer: Path, num_documents: int = 40, words: int = 120, **settings) -> Path:
    """Write two domains of jsonl and their CORPORA.yaml; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, base in (("alpha", 1000), ("beta", 5000)):
        lines = [json.dumps({"text": text(base + i, words + i % 7), "source": str(i)}) for i in range(num_documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer": str(tokenizer),
        "domains": {name: {"paths": [f"{name}.jsonl"]} for name in ("alpha", "beta")},
        "held_out": {"fraction": 0.1, "min_documents": 4},
    }
    path = folder / "corpora.yaml"
    path.write_text(yaml.safe_dump(config | settings))
    return path
