"""Records of analyses as `scion analyze` writes them, and what a test reads of a page that was made of one."""

import base64
import re
import struct
import zlib
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

CRITERIA = ("removal", "block_influence", "max_rank")

Record = dict[str, Any]


def ranks_of(layers: int, lazy: tuple[int, ...] = ()) -> list[float]:
    return [1.2 if k in lazy else 30.0 + k for k in range(layers)]


def look_of(layers: int, heads: int, lazy: tuple[int, ...] = (), name: str = "tiny") -> Record:
    """Return what is kept of a model, here and of the other one: half the heads of a potent layer are of rank 1."""
    ranks = ranks_of(layers, lazy)
    ratio = [1.0 if k in lazy else (heads // 2) / heads for k in range(layers)]
    half = layers // 2
    groups = [("first half", 0, half), ("second half", half, layers)] if half else []
    counted = {
        "max_rank": ranks,
        "mean_mass": [rank / 2 for rank in ranks],
        "lazy_layers": list(lazy),
        "rank1_head_ratio": sum(ratio) / layers,
        "mean_rank": 7.25,
    }
    return {
        "model": {
            "name": name,
            "revision": None,
            "license": "mit",
            "weights_sha256": "ab" * 32,
            "origins": None,
            "model_type": "llama",
            "num_parameters": 12_345_678,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        },
        "overall": {
            "lazy_group_from": None,
            **{key: counted[key] for key in ("lazy_layers", "rank1_head_ratio", "mean_rank")},
            "num_heads": layers * heads,
            "sink_at_first_token": 0.86,
            "sink_mass": 0.5,
            "num_matrices": layers * heads * 10,
            "rank_ties": 3,
            "mass_ties": 2,
            "nll": 3.5,
        },
        "layers": [
            {
                "index": k,
                "max_rank": ranks[k],
                "max_rank_std": 2.0,
                "mean_mass": ranks[k] / 2,
                "mean_mass_std": 1.0,
                "lazy": k in lazy,
                "rank1_head_ratio": ratio[k],
                "removal": 1.0 / (k + 1),
                "removal_error": 0.01,
                "block_influence": 0.1,
                "angular_distance": 0.2,
                "cka_distance": 0.01,
                "update_norm": 0.3,
                "output_norm": 50.0 + k,
                "weight_norm": 360.0,
                "taylor": 0.05,
                "lens": 0.4,
                "query_gradient": 0.02,
                "key_gradient": 0.03,
            }
            for k in range(layers)
        ],
        "heads": [
            {"layer": k, "head": h, "rank": 1.0 + k + h / 100, "mass": 2.0 + h, "sink_mass": 0.25}
            for k in range(layers)
            for h in range(heads)
        ],
        "groups": [
            {"name": n, "first": a, "last": b - 1, "avg_rank": sum(ranks[a:b]) / (b - a), "avg_mass": 9.0}
            | {"lazy": 1 <= sum(ranks[a:b]) / (b - a) < 2}
            for n, a, b in groups
        ],
        "domains": [{"name": n, "num_sequences": 5, **counted} for n in ("prose", "code")],
        "lengths": [{"seq_len": n, **counted} for n in (48, 96)],
        "lens": [{"nll": 9.0 - k / 2, "error": 0.1} for k in range(layers + 1)],
    }


def record_of(layers: int = 4, heads: int = 2, lazy: tuple[int, ...] = (), **changes: Any) -> Record:
    """Return a record as `scion analyze` writes it."""
    look = look_of(layers, heads, lazy)
    swept = {key: look["domains"][0][key] for key in ("max_rank", "lazy_layers", "rank1_head_ratio", "mean_rank")}
    square = [[1 - abs(i - k) / (layers + 1) for k in range(layers + 1)] for i in range(layers + 1)]
    keep = f"0-{layers // 2 - 1}" if layers > 3 else "0"
    record = look | {
        "format_version": 1,
        "seq_len": 96,
        "num_sequences": 10,
        "loss_sequences": 7,
        "tau": 0.9,
        "eta": 0.85,
        "lazy_tolerance": 0.5,
        "exact": False,
        "precision": "fp32",
        "seed": 11,
        "taus": [{"tau": tau, **swept} for tau in (0.8, 0.9)],
        "etas": [{"eta": eta, "mean_mass": swept["max_rank"]} for eta in (0.85, 0.95)],
        "similarity": square,
        "angular": [[1 - value for value in row] for row in square],
        "greedy": None,
        "criteria": [
            {"name": name, "what": f"what {name} is", "scores": [layer[name] for layer in look["layers"]]}
            for name in CRITERIA
        ],
        "correlation": [[1.0, 0.25, -0.5], [0.25, 1.0, 0.75], [-0.5, 0.75, 1.0]],
        "suggestions": [
            {"by": "first", "keep": keep, "num_layers": max(1, layers // 2), "why": "the first layers"},
            {"by": "removal", "keep": str(layers - 1), "num_layers": 1, "why": "what it costs"},
            {"by": "potent_prefix", "keep": f"0-{layers - 1}", "num_layers": layers, "why": "the layers before it"},
        ],
        "layer_scores_by": "removal",
        "data": {"path": "corpus/mine", "fingerprint": "cd" * 32, "split": "train"},
        "device": {"kind": "cpu", "name": "a processor", "threads": 2, "precision": "fp32"},
        "seconds": {"forward": 12.5, "greedy-2": 125.0},
        "against": None,
    }
    return record | changes


def maps_of(layers: int, tokens: int = 3) -> Record:
    attention = [[1.0 / (i + 1) if k <= i else 0.0 for k in range(tokens)] for i in range(tokens)]
    maps = [{"layer": k, "head": h, "rank": 5.0 + h, "attention": attention} for k in range(layers) for h in range(2)]
    return {"format_version": 1, "num_sequences": 10, "maps": maps}


def drawings(document: str) -> dict[str, list[ElementTree.Element]]:
    """Return the drawings, wide and narrow, by title."""
    found: dict[str, list[ElementTree.Element]] = {}
    for one in re.findall(r"<svg.*?</svg>", document, re.DOTALL):
        root = ElementTree.fromstring(one)
        found.setdefault(root.findtext("title") or "", []).append(root)
    return found


def decoded(picture: bytes) -> list[list[int]]:
    """Return the alpha channel of a PNG of the one kind that is written, read by the rules of the format."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        kind, data = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]
        assert struct.unpack(">I", picture[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, color, rest) == (8, 4, [0, 0, 0])
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (2 * width + 1)
    rows = [raw[k * (2 * width + 1) : (k + 1) * (2 * width + 1)] for k in range(height)]
    assert all(row[0] == 0 and set(row[1::2]) == {255} for row in rows)
    return [list(row[2::2]) for row in rows]


def picture_in(root: ElementTree.Element) -> list[list[int]]:
    (image,) = [each for each in root.iter() if each.tag.endswith("image")]
    kind, _, data = image.attrib["href"].partition(",")
    assert kind == "data:image/png;base64"
    return decoded(base64.b64decode(unquote(data), validate=True))
