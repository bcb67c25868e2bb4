"""Text with sentences and code to make items of, and a data folder of it."""

import json
import random
from pathlib import Path

import yaml

from scionlm.data import DataFolder, load_corpora, prepare

NAMES = ("anna", "berta", "carla", "doris", "elena", "fiona", "greta", "hanna", "irene", "julia")
THINGS = ("garden", "window", "letter", "basket", "kettle", "lantern", "mirror", "violin", "carpet", "hammer")


def story(seed: int, sentences: int = 30) -> str:
    """Sentences whose last word stood in the one before."""
    rng = random.Random(seed)
    parts = []
    for _ in range(sentences):
        thing, name = rng.choice(THINGS), rng.choice(NAMES)
        parts.append(f"At {rng.randrange(10**6)} {name} took the {thing} from the table and cleaned it for an hour.")
        parts.append(f"Later that day another person asked {name} to give back the old {thing}.")
    return " ".join(parts)


def program(seed: int, functions: int = 20) -> str:
    rng = random.Random(seed)
    lines = []
    for number in range(functions):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        lines += [
            f"def {name}_{number}({thing}):",
            f"    value_{number} = {thing}.{rng.choice(THINGS)}()",
            f"    if value_{number} > {rng.randrange(1000)}:",
            f"        return {rng.choice(NAMES)}({thing}, {rng.randrange(1000)})",
            f"    for item in {rng.choice(THINGS)}({number}):",
            f"        {thing}.append(item + {rng.randrange(1000)})",
            "    return value",
            "",
        ]
    return "\n".join(lines)


def written_data(folder: Path, tokenizer: Path, documents: int = 12) -> DataFolder:
    folder.mkdir(parents=True)
    for name, make, base in (("tales", story, 0), ("python", program, 500)):
        lines = [json.dumps({"text": make(base + i)}) for i in range(documents)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer": str(tokenizer),
        "domains": {name: {"paths": [f"{name}.jsonl"]} for name in ("tales", "python")},
        "held_out": {"fraction": 0.5, "min_documents": 6},
    }
    path = folder / "corpora.yaml"
    path.write_text(yaml.safe_dump(config))
    prepare(load_corpora(path), folder, folder / "data")
    return DataFolder(folder / "data")


def places(data: DataFolder) -> dict:
    return {name: (data, name) for name in data.domains}


def task_folder(folder: Path, **changes) -> Path:
    """A multiple-choice task `fruit` of twelve items and a rolling one, on local files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": f"{NAMES[i % 10]} likes the {THINGS[i % 7]} and",
            "options": [" more", " the less", " it"],
            "right": i % 3,
        }
        for i in range(12)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    fruit = {
        "task": "fruit",
        **common,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
    }
    reading = {
        "task": "reading",
        **common,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (folder / "fruit.yaml").write_text(yaml.safe_dump(fruit | changes))
    (folder / "reading.yaml").write_text(yaml.safe_dump(reading))
    return folder
