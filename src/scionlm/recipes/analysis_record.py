"""What `analysis.json` and the tables beside it hold, from the arrays that were measured."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scionlm.analysis.collapse import CollapseSettings, HeadCounts
from scionlm.analysis.ranking import CRITERIA, rank_correlation, suggest
from scionlm.analysis.summary import Collapse, layer_scores
from scionlm.core.files import write_text_atomic
from scionlm.core.records import Record, write_json
from scionlm.families import ModelShape, count_parameters
from scionlm.recipes.analysis_options import AnalyzeOptions
from scionlm.recipes.analysis_store import Arrays
from scionlm.surgery.indices import format_indices


def collapse_settings(options: AnalyzeOptions) -> CollapseSettings:
    """Return what is counted of attention."""
    lengths = tuple(options.all_lengths)
    return CollapseSettings(options.seq_len, options.tau, options.eta, lengths=lengths, exact=options.exact)


def analysis_record(
    config: dict[str, Any], model: Record, arrays: dict[str, Arrays], options: AnalyzeOptions, domains: Sequence[str]
) -> Record:
    """Return what is said of a model.

    Args:
        config: Its `config.json`.
        model: Where it comes from.
        arrays: What was measured, by part.
        options: How.
        domains: The domain of each sequence.
    """
    shape = ModelShape.of(config)
    settings = collapse_settings(options)
    counts = HeadCounts(**{name: arrays["forward"][f"heads.{name}"] for name in HeadCounts.names()})
    collapse = Collapse(counts, settings, options.lazy_tolerance)
    layers = _layers(collapse.layers(), arrays)
    scores = layer_scores(layers, list(CRITERIA))
    number = options.layers or max(1, shape.num_hidden_layers // 2)
    greedy = arrays.get("greedy")
    order = None if greedy is None else greedy["order"].tolist()
    angular = arrays["forward"]["angular"]
    found = suggest(scores, number, angular, order, options.lazy_tolerance)
    default = next(name for name in CRITERIA if name in scores)
    activation = arrays["forward"]["activation.heads"]
    heads = [head | {"activation": float(activation[head["layer"], head["head"]])} for head in collapse.heads()]
    return {
        "model": model
        | {
            "model_type": config["model_type"],
            "num_parameters": count_parameters(config)["total"],
            **shape.to_dict(),
        },
        "seq_len": options.seq_len,
        "num_sequences": options.num_sequences,
        "loss_sequences": options.num_loss_sequences,
        "tau": options.tau,
        "eta": options.eta,
        "lazy_tolerance": options.lazy_tolerance,
        "exact": options.exact,
        "precision": options.precision,
        "seed": options.seed,
        "overall": collapse.overall() | {"nll": float(arrays["removal"]["whole"].mean())},
        "layers": layers,
        "heads": heads,
        "groups": collapse.groups(),
        **collapse.sweeps(),
        "domains": collapse.domains(domains),
        "lens": _mean_and_error(arrays["lens"]["values"]),
        "similarity": arrays["forward"]["similarity"].tolist(),
        "angular": angular.tolist(),
        "greedy": None if greedy is None else {"order": order, "nll": greedy["losses"].tolist()},
        "criteria": [{"name": name, "what": CRITERIA[name], "scores": scores[name].tolist()} for name in scores],
        "correlation": rank_correlation(scores).tolist(),
        "suggestions": [
            {"by": each.by, "keep": format_indices(each.keep), "num_layers": len(each.keep), "why": each.why}
            for each in found
        ],
        "layer_scores_by": default,
        "layer_scores": scores[default].tolist(),
    }


def _layers(layers: list[Record], arrays: dict[str, Arrays]) -> list[Record]:
    """Return what is said of each layer: of its attention, and everything else."""
    forward, removal, lens = arrays["forward"], arrays["removal"], arrays["lens"]["values"].mean(1)
    paired = removal["without"] - removal["whole"]
    more = {
        "block_influence": forward["block_influence"],
        "angular_distance": forward["angular"].diagonal(1),
        "cka_distance": 1.0 - forward["similarity"].diagonal(1),
        "update_norm": forward["update_norm"],
        "output_norm": forward["output_norm"],
        "weight_norm": forward["weight_norm"],
        "removal": paired.mean(1),
        "removal_error": _errors(paired),
        "lens": lens[:-1] - lens[1:],
        **{name: arrays["gradients"][name] for name in ("taylor", "query_gradient", "key_gradient")},
    }
    return [layer | {name: float(values[layer["index"]]) for name, values in more.items()} for layer in layers]


def _errors(values: np.ndarray) -> np.ndarray:
    """Return standard errors of means over sequences, the last axis; 0 where there is one."""
    count = values.shape[-1]
    return values.std(-1, ddof=1) / count**0.5 if count > 1 else np.zeros(values.shape[:-1])


def _mean_and_error(values: np.ndarray) -> list[Record]:
    return [
        {"nll": float(mean), "error": float(error)}
        for mean, error in zip(values.mean(-1), _errors(values), strict=True)
    ]


def attention_maps(record: Record, arrays: Arrays) -> Record:
    """Return, of each layer, the mean attention of the head with the largest rank, and of the one with the smallest."""
    found: list[Record] = []
    for layer in range(len(record["layers"])):
        heads = sorted((head for head in record["heads"] if head["layer"] == layer), key=lambda head: -head["rank"])
        for head in heads[:: max(1, len(heads) - 1)]:
            attention = np.round(arrays["heads.maps"][layer, head["head"]].astype(np.float64), 4)
            found.append({"layer": layer, "head": head["head"], "rank": head["rank"], "attention": attention.tolist()})
    return {"num_sequences": record["num_sequences"], "maps": found}


def write_analysis(record: Record, arrays: Arrays, out: Path) -> None:
    """Write `maps.json`, `layers.csv`, `heads.csv` and, last, `analysis.json`."""
    write_json(out / "maps.json", attention_maps(record, arrays))
    for name in ("layers", "heads"):
        rows: list[Record] = record[name]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(out / f"{name}.csv", text.getvalue())
    write_json(out / "analysis.json", record)
