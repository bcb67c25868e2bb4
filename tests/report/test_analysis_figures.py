"""Figures of an analysis: what is in them, that they do not change by themselves, and what they bear."""

import builtins
import json
import math
import os
import re
import struct
import subprocess
import sys
from hashlib import sha256
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.image import AxesImage

from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.report import analysis_figures
from scionlm.report.analysis_figures import PLOTS, draw, require_matplotlib, write_figures
from scionlm.report.analysis_plots import Facts

LAYERS, HEADS, TOKENS = 5, 3, 6
CRITERIA = ("removal", "taylor", "lens")
SVG = "{http://www.w3.org/2000/svg}"


def model_of(name, layers, seed=0):
    """Return what is said of a model, its own record or the one beside it."""
    rng = np.random.default_rng(seed)
    keys = ("max_rank", "max_rank_std", "mean_mass", "mean_mass_std", "removal", "removal_error")
    return {
        "model": {"name": name, "num_hidden_layers": layers},
        "overall": {"nll": 3.5},
        "layers": [{"index": i} | {key: float(rng.uniform(1, 9)) for key in keys} for i in range(layers)],
        "heads": [
            {"layer": layer, "head": head, "rank": float(rng.uniform(1, 9))}
            for layer in range(layers)
            for head in range(HEADS)
        ],
        "lens": [{"nll": 20.0 - 2 * i, "error": 0.1} for i in range(layers + 1)],
    }


@pytest.fixture
def record():
    rng = np.random.default_rng(1)
    ranks = rng.uniform(1, 9, LAYERS).tolist()
    return model_of("source", LAYERS) | {
        "format_version": 1, "seq_len": 100, "tau": 0.9, "eta": 0.85, "lazy_tolerance": 0.5,
        "taus": [{"tau": tau, "max_rank": ranks} for tau in (0.8, 0.95)],
        "lengths": [{"seq_len": length, "max_rank": ranks} for length in (25, 50, 100)],
        "similarity": np.eye(LAYERS + 1).tolist(),
        "criteria": [{"name": name, "what": "", "scores": rng.normal(size=LAYERS).tolist()} for name in CRITERIA],
        "correlation": [[1.0, 0.25, -0.5], [0.25, 1.0, -0.001], [-0.5, -0.001, 1.0]],
        "greedy": {"order": [3, 1], "nll": [3.75, 4.5]},
        "against": model_of("child", 3, seed=2),
    }  # fmt: skip


@pytest.fixture
def maps():
    attention = np.tril(np.ones((TOKENS, TOKENS)) / np.arange(1, TOKENS + 1)[:, None]).tolist()
    return [
        {"layer": layer, "head": head, "rank": 2.0, "attention": attention}
        for layer in range(LAYERS)
        for head in (0, 2)
    ]


@pytest.fixture
def write(tmp_path, record, maps):
    """Write a folder of an analysis, changed; return it."""

    def write(**changes):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        changed = {key: value for key, value in (record | changes).items() if value is not ...}
        (folder / "analysis.json").write_text(json.dumps(changed))
        (folder / "maps.json").write_text(json.dumps({"format_version": 1, "maps": maps}))
        return folder

    return write


@pytest.fixture
def figure(record, maps):
    """Draw one figure of the record, changed, without writing it."""

    def figure(name, with_maps=maps, **changes):
        return PLOTS[name](Facts(record | changes, with_maps))

    return figure


def texts(svg):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def svg_of(name, record, maps=None):
    drawn = draw(name, Facts(record, maps))
    assert drawn
    return drawn[0].decode()


def test_every_figure_is_written_as_svg_and_png(write):
    folder = write()
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.txt").write_text("kept")
    paths = write_figures(folder)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png")]
    assert {path.parent for path in paths} == {folder / "figures"}
    for path in paths:
        data = path.read_bytes()
        if path.suffix == ".png":
            assert data.startswith(b"\x89PNG\r\n\x1a\n")
            width, height = struct.unpack(">II", data[16:24])
            assert {3.4, 7.0} & {round(width / 300, 1)} or path.stem == "correlation"
            assert 400 < height < 2700
            assert b"tEXtSoftware" not in data
        else:
            text = data.decode()
            assert ElementTree.fromstring(text).tag == f"{SVG}svg"
            assert "<text" in text
            assert "dc:date" not in text
            assert "Matplotlib" not in text
    assert sorted(path.name for path in folder.iterdir()) == ["analysis.json", "figures", "maps.json"]
    assert len(list((folder / "figures").iterdir())) == len(paths) + 1


def test_another_process_draws_the_same_bytes(write, maps):
    folder, names = write(), ("max_rank", "correlation", "maps")
    code = (
        "import json, sys; from hashlib import sha256; from pathlib import Path\n"
        "from scionlm.report.analysis_figures import Facts, draw\n"
        "record, maps = (json.loads(Path(sys.argv[1], f'{name}.json').read_text()) for name in ('analysis', 'maps'))\n"
        "for name in sys.argv[2:]:\n"
        "    for data in draw(name, Facts(record, maps['maps'])): print(sha256(data).hexdigest())\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    facts = Facts(json.loads((folder / "analysis.json").read_text()), maps)
    here = [sha256(data).hexdigest() for name in names for data in draw(name, facts) or ()]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *names],
        env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == here, done.stderr


def test_settings_of_the_user_change_nothing_and_are_left_alone(record, monkeypatch):
    plain = svg_of("max_rank", record)
    mine = {"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 9, "text.parse_math": True, "axes.grid": True}
    for key, value in mine.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    before = dict(matplotlib.rcParams)
    assert svg_of("max_rank", record) == plain
    assert dict(matplotlib.rcParams) == before


UNITS = {
    "max_rank": ["MaxRank (τ = 0.9)", "layer"],
    "mean_mass": ["mean mass, columns (η = 0.85)", "layer"],
    "rank_heads": ["rank (τ = 0.9)", "head"],
    "removal": ["rise in loss without it (nats)", "layer"],
    "criteria": [*CRITERIA, "nats", "layer"],
    "correlation": [*CRITERIA, "rank correlation of layers (Spearman)", ".25", "\u2212.50", ".00", "1.00"],
    "similarity": ["CKA of hidden states", "layers passed (0: embedding)"],
    "rank_by_length": ["25 tokens", "50 tokens", "100 tokens", "MaxRank (τ = 0.9)"],
    "rank_by_tau": ["τ = 0.8", "τ = 0.95", "MaxRank"],
    "lens": ["loss (nats)", "layers passed (0: embedding)"],
    "greedy": ["loss (nats)", "layers taken out (number: which one)", "3", "1"],
    "maps": ["attention, mean over sequences", "layer 0, head 0", "layer 4, head 2", "rank 2.0"],
}


@pytest.mark.parametrize("name", PLOTS)
def test_labels_have_units_and_the_title_has_the_model_and_the_length(record, maps, name):
    found = texts(svg_of(name, record, maps))
    for wanted in UNITS[name]:
        assert wanted in found, found
    if name == "rank_by_length":
        assert "source, sequences of 25, 50, 100 tokens" in found
    else:
        assert [text for text in found if text.startswith("source, sequences of 100 tokens")]
    both = name in ("max_rank", "mean_mass", "lens")
    assert ("child" in found) == both


def test_lines_bars_and_cells_are_those_of_the_record(figure, record):
    for name, key in (("max_rank", "max_rank"), ("mean_mass", "mean_mass")):
        lines = figure(name).axes[0].lines
        for line, model in zip(lines, (record, record["against"]), strict=True):
            assert line.get_ydata().tolist() == [layer[key] for layer in model["layers"]]
        bands = figure(name).axes[0].collections
        layer = record["layers"][2]
        edges = [y for x, y in bands[0].get_paths()[0].vertices if x == 2]
        assert min(edges) == pytest.approx(layer[key] - layer[f"{key}_std"])
        assert max(edges) == pytest.approx(layer[key] + layer[f"{key}_std"])
        assert len(figure(name, against=None).axes[0].lines) == 1
        assert not figure(name, against=None).legends
    bars = figure("removal").axes[0].patches
    assert [bar.get_height() for bar in bars] == [layer["removal"] for layer in record["layers"]]
    (image,) = figure("rank_heads").axes[0].images
    assert image.get_array().tolist() == [
        [
            next(h["rank"] for h in record["heads"] if (h["layer"], h["head"]) == (layer, head))
            for layer in range(LAYERS)
        ]
        for head in range(HEADS)
    ]
    assert [axes.lines[0].get_ydata().tolist() for axes in figure("criteria").axes] == [
        each["scores"] for each in record["criteria"]
    ]
    assert figure("correlation").axes[0].images[0].get_array().tolist() == record["correlation"]
    assert figure("similarity").axes[0].images[0].get_array().tolist() == record["similarity"]
    assert len(figure("rank_by_length").axes[0].lines) == 3
    assert len(figure("rank_by_tau").axes[0].lines) == 2
    assert figure("greedy").axes[0].lines[0].get_ydata().tolist() == [3.5, 3.75, 4.5]
    losses = figure("lens").axes[0].lines
    assert losses[0].get_ydata().tolist() == [each["nll"] for each in record["lens"]]
    assert len(losses[-1].get_xdata()) == 4


def images(figure):
    return [image for axes in figure.axes for image in axes.get_children() if isinstance(image, AxesImage)]


@pytest.mark.parametrize(("layers", "shown"), [(1, 2), (5, 10), (12, 24), (40, 24)])
def test_maps_are_of_a_dozen_layers_at_most_the_first_and_the_last_among_them(figure, maps, layers, shown):
    many = [maps[number % 2] | {"layer": number // 2} for number in range(2 * layers)]
    found = figure("maps", many)
    assert len(images(found)) == shown
    titles = [axes.get_title(loc="left") + axes.get_title() for axes in found.axes]
    assert any(title.startswith("layer 0,") for title in titles)
    assert any(title.startswith(f"layer {layers - 1},") for title in titles)


def test_layers_of_a_single_head_have_a_single_map(figure, maps):
    assert len(images(figure("maps", [each for each in maps if each["head"] == 0]))) == LAYERS


def test_heads_that_have_collapsed_have_a_dot(figure, record):
    heads = [head | {"rank": 1.2 if head["layer"] == 3 else 4.0} for head in record["heads"]]
    axes = figure("rank_heads", heads=heads).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[3, 0], [3, 1], [3, 2]]
    assert axes.get_xlabel() == "layer (dot: rank below 1.5)"


def test_a_value_that_would_hide_all_others_makes_the_scale_logarithmic(figure, record):
    layers = [dict(layer) for layer in record["layers"]]
    assert figure("removal").axes[0].get_yscale() == "linear"
    layers[0]["removal"], layers[1]["removal"] = 5000.0, -2.0
    axes = figure("removal", layers=layers).axes[0]
    assert axes.get_yscale() == "symlog"
    assert "nats, symlog" in axes.get_ylabel()
    zeros = [layer | {"removal": 0.0} for layer in layers]
    assert figure("removal", layers=zeros).axes[0].get_yscale() == "linear"
    lens = [{"nll": nll, "error": 0.1} for nll in (100.0, 30.0, 3.0)]
    assert figure("lens", lens=lens).axes[0].get_yscale() == "log"
    found = texts(svg_of("lens", record | {"lens": lens}))
    assert {"5", "50", "100"} <= set(found)
    assert not [text for text in found if "$" in text or "mathdefault" in text]


NEEDS = {
    "model": set(PLOTS),
    "seq_len": set(PLOTS) - {"rank_by_length"},
    "layers": {"max_rank", "mean_mass", "removal"},
    "heads": {"rank_heads"},
    "lazy_tolerance": {"rank_heads"},
    "criteria": {"criteria", "correlation"},
    "correlation": {"correlation"},
    "similarity": {"similarity"},
    "lengths": {"rank_by_length"},
    "taus": {"rank_by_tau"},
    "lens": {"lens"},
    "greedy": {"greedy"},
    "overall": {"greedy"},
    "tau": {"max_rank", "rank_heads", "rank_by_length"},
    "eta": {"mean_mass"},
    "against": set(),
}


@pytest.fixture
def quick(monkeypatch):
    """Draw no pixels."""
    monkeypatch.setattr(analysis_figures, "_saved", lambda figure, kind, metadata: kind.encode())


@pytest.mark.parametrize("key", NEEDS)
def test_without_a_key_only_what_is_drawn_of_it_is_missing(quick, record, maps, key):
    facts = Facts({name: value for name, value in record.items() if name != key}, maps)
    some = set(PLOTS) if key in ("seq_len", "layers") else NEEDS[key] | {"max_rank", "greedy", "similarity"}
    assert {name for name in some if draw(name, facts)} == some - NEEDS[key]


@pytest.mark.parametrize("wrong", [None, 7, "x", [], {}, [None], [[]], [[1, 2], [3]], float("nan"), [1e300]], ids=ascii)
def test_what_is_of_another_type_is_never_a_fault(quick, record, maps, wrong):
    usable = {"model", "seq_len", "tau", "eta", "lazy_tolerance", "lens"}  # of some of these a number can be made
    for key in sorted(NEEDS):
        drawn = {name for name in sorted(NEEDS[key])[:3] if draw(name, Facts(record | {key: wrong}, maps))}
        assert not drawn or key in usable, key
    for name in ("max_rank", "lens"):
        draw(name, Facts(record | {"against": wrong}, maps))


@pytest.mark.parametrize("wrong", [None, 7, "x", [], [None], [{"layer": 0}], [{"layer": "x"}], {"layer": 1}])
def test_maps_that_are_none_are_left_out(quick, record, wrong):
    assert draw("maps", Facts(record, wrong)) is None
    assert draw("max_rank", Facts(record, wrong))


def test_figures_that_are_no_longer_there_are_taken_away(write):
    folder = write(**{key: ... for key in NEEDS if key not in ("model", "seq_len", "greedy", "overall")})
    (folder / "maps.json").unlink()
    assert [path.name for path in write_figures(folder)] == ["greedy.svg", "greedy.png"]
    folder = write(**{key: ... for key in NEEDS if key not in ("model", "seq_len", "similarity")})
    (folder / "maps.json").write_text('{"format_version": 1, "maps": [')
    assert [path.name for path in write_figures(folder)] == ["similarity.svg", "similarity.png"]
    assert len(list((folder / "figures").iterdir())) == 2


def test_a_large_model_is_drawn_and_an_endless_one_is_not(quick, record):
    large = model_of("large", 200)
    assert draw("max_rank", Facts(record | large))
    endless = record | {"layers": record["layers"] * 1000, "similarity": [[0.0] * 1002]}
    for name in ("max_rank", "removal", "similarity"):
        assert draw(name, Facts(endless)) is None
    names = [{"name": str(i), "scores": [1.0]} for i in range(500)]
    many = record | {"criteria": names, "correlation": np.eye(500).tolist(), "taus": record["taus"] * 500}
    assert draw("criteria", Facts(many))
    assert draw("correlation", Facts(many)) is None
    assert draw("rank_by_tau", Facts(many))


HOSTILE = [
    "$x^2$", "a$b", r"$\frac{1}{0}$", r"\undefined{$", "<script>alert(1)</script>", "a & b", "_hidden", "%d %s {}",
    "模型\U0001d7d9", "a\nb\tc", "nul\x00\x1b[31m", "\ud800", "\u202egnp", "x" * 5000, '"quoted"',
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_shown_as_they_are(record, name, monkeypatch):
    saved = analysis_figures._saved
    monkeypatch.setattr(
        analysis_figures, "_saved", lambda f, kind, more: saved(f, kind, more) if kind == "svg" else b""
    )
    model = {"name": name}
    changed = record | {"model": model, "against": record["against"] | {"model": model}}
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    end = shown[-20:] if len(shown) > 20 else shown
    found = texts(svg_of("max_rank", changed))
    assert len([text for text in found if end in text]) == 3, "the title, and twice in the legend"
    assert not [text for text in found if len(text) > 100]


def test_criteria_of_any_name_are_shown(record):
    changed = record | {"criteria": [record["criteria"][0] | {"name": "$x^2$ & <b>"}, *record["criteria"][1:]]}
    for name in ("criteria", "correlation"):
        assert "$x^2$ & <b>" in texts(svg_of(name, changed))


def test_letters_that_the_font_lacks_make_no_noise(record, recwarn, capfd):
    assert draw("max_rank", Facts(record | {"model": {"name": "模型"}}))
    assert not list(recwarn)
    assert capfd.readouterr().err == ""


def without_matplotlib(monkeypatch):
    original = builtins.__import__

    def refusing(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refusing)


def test_without_matplotlib_the_remedy_is_named_and_nothing_written(write, monkeypatch):
    require_matplotlib()
    folder = write()
    without_matplotlib(monkeypatch)
    for call in (require_matplotlib, lambda: write_figures(folder)):
        with pytest.raises(UsageError, match=re.escape("pip install 'scionlm[plots]'")):
            call()
    assert not (folder / "figures").exists()


def test_no_analysis_a_newer_one_and_an_unwritable_place_are_named(write, tmp_path):
    with pytest.raises(DataError, match=r"analysis\.json is missing"):
        write_figures(tmp_path)
    with pytest.raises(DataError, match="format_version 2"):
        write_figures(write(format_version=2))
    folder = write()
    (folder / "figures").write_text("in the way")
    with pytest.raises(StorageError, match="figures"):
        write_figures(folder)
    assert (folder / "figures").read_text() == "in the way"


def test_numbers_that_json_calls_not_a_number_are_left_out(quick, record):
    layers = [layer | {"max_rank": math.nan} for layer in record["layers"]]
    assert draw("max_rank", Facts(record | {"layers": layers})) is None
    assert draw("mean_mass", Facts(record | {"layers": layers}))
