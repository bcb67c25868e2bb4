"""Tiny models, tokenizers and texts, made on the spot: no network, no downloads."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scionlm.data import DataFolder
from scionlm.families import family_of
from scionlm.families.registry import FAMILIES
from scionlm.recipes.config import Recipe
from scionlm.recipes.order import Sampling, check_supply, sampling_of
from scionlm.sources import ModelFolder, open_folder

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


NUM_LAYERS = 5
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}],
    "mistral": [{"sliding_window": 8}],
    "qwen2": [{"tie_word_embeddings": True, "num_key_value_heads": 1}],
    "qwen3": [{"attention_bias": True, "tie_word_embeddings": True}],
    "gemma2": [{"tie_word_embeddings": False}],
    "smollm3": [{"use_sliding_window": True, "tie_word_embeddings": False}],
    "gpt2": [{"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False}],
    "gpt_neox": [{"use_parallel_residual": False, "tie_word_embeddings": True}, {"attention_bias": False}],
    "opt": [{"tie_word_embeddings": False}, {"enable_bias": False}],
    "starcoder2": [{"use_bias": False, "tie_word_embeddings": False}],
    "stablelm": [{"qk_layernorm": True, "use_qkv_bias": True}, {"use_parallel_residual": True}],
    "cohere2": [{"attention_bias": True}],
    "granite": [{"residual_multiplier": 0.7, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "mlp_bias": True}],
    "phi3": [{"tie_word_embeddings": True}],
}
"""Settings beside the plain ones under which a family is tested too."""
MODELS = [
    (model_type, changes)
    for family in FAMILIES
    for model_type in family.model_types
    for changes in ({}, *VARIANTS.get(model_type, ()))
]
"""Every family in every variant: a new family is in all tests by being registered."""
MODEL_IDS = ["-".join([model_type, *map(str, changes)]) for model_type, changes in MODELS]


def tiny_config(model_type: str = "llama", **changes: Any) -> PreTrainedConfig:
    """Return a configuration with grouped heads, an untypical head size and layers of several kinds where it can be."""
    family = family_of({"model_type": model_type})
    heads = {"head_dim": 8} if family.has_head_dim else {}
    groups = {"num_key_value_heads": 2} if family.has_kv_heads else {}
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40 if family.has_head_dim else 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True if model_type in ("llama", "mistral") else family.defaults["tie_word_embeddings"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if model_type in ("llama", "mistral"):
        sizes["hidden_size"] = 32
    config = {family.key(name): value for name, value in (sizes | heads | groups).items()}
    for key, wanted in family.required_config.items():
        if isinstance(wanted, str):
            config[key] = config[family.key(wanted)]
    layers = changes.get("num_hidden_layers", NUM_LAYERS)
    patterns = {"layer_types": ("sliding_attention", "full_attention", "full_attention"), "no_rope_layers": (1, 1, 0)}
    for key in family.per_layer_config:
        config[key] = [patterns[key][i % 3] for i in range(layers)]
    if "layer_types" in family.per_layer_config:
        config |= {"sliding_window": 8, "use_sliding_window": True}
    return AutoConfig.for_model(model_type, **(config | changes))


def tiny_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny model with random weights; biases and norm gains are random too, so that losing one shows.

    The same one is made once: later calls get copies, and torch's dice as they were after the first.
    """
    key = (model_type, seed, json.dumps(changes, sort_keys=True, default=str))
    if key not in _models:
        _models[key] = _random_model(model_type, seed, changes), torch.get_rng_state()
    model, dice = _models[key]
    torch.set_rng_state(dice)
    return copy.deepcopy(model)


_models: dict[tuple[str, int, str], tuple[PreTrainedModel, torch.Tensor]] = {}


def _random_model(model_type: str, seed: int, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(4.0)  # large enough that each layer matters to the logits
    return model


_made: dict[str, ModelFolder] = {}


def tiny_source(root: Path, model_type: str, changes: dict) -> ModelFolder:
    """Return the folder of a tiny model of a family."""
    key = f"{model_type}-{'-'.join(map(str, changes))}"
    if key not in _made:
        folder = root / key
        tiny_model(model_type, **changes).save_pretrained(folder)
        _made[key] = open_folder(folder)
    return _made[key]


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


def first_sampling(recipe: Recipe, data: DataFolder) -> Sampling:
    """Return how a recipe's first stage draws from its data, its supply checked."""
    stage = recipe.resolved_stages[0]
    sampling = sampling_of(stage, data, recipe.seed, Path())
    check_supply([(stage, sampling)])
    return sampling
