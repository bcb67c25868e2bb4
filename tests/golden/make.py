"""Write the golden files of the current format version that are not there; what is there stays and must stay readable.

PYTHONPATH=tests python tests/golden/make.py
"""

import os
import shutil
import tempfile
from pathlib import Path

from factories import corpora_file, model_folder
from scionlm import api
from scionlm.core.records import FORMAT_VERSION
from scionlm.data import load_corpora, prepare
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe

OUT = Path(__file__).resolve().parent / f"v{FORMAT_VERSION}"
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 2}


def main() -> None:
    """Make what is missing."""
    if not (OUT / "run").exists():
        make_run()
    if not (OUT / "analysis").exists():
        make_analysis()


def make_run() -> None:
    """Make a data folder and a run folder with a checkpoint, as small as they come."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # so that only relative paths are written down
        work = Path()
        source = model_folder(Path("source"), **SIZES)
        corpora = corpora_file(Path("text"), Path("../source"), num_documents=8, words=40)
        prepare(load_corpora(corpora), corpora.parent, OUT / "data")
        settings = {
            "source": str(source), "data.dir": str(OUT / "data"), "data.mixture": None, "data.seq_len": 16,
            "inherit.layers": 1, "train.tokens": 64 * 6, "train.global_batch_tokens": 64, "train.precision": "fp32",
            "evaluate.tokens_per_domain": 32, "checkpoint.every": 2, "checkpoint.keep": 1,
        }  # fmt: skip
        run_recipe(load_recipe("inheritune-mini", settings), work / "run")
        shutil.copytree(work / "run", OUT / "run", ignore=shutil.ignore_patterns(".lock", "model"))
        # Where it was made is nobody's business.
        for path in OUT.rglob("*"):
            if path.suffix in (".json", ".yaml"):
                path.write_text(path.read_text().replace(str(OUT), "golden"))


def make_analysis() -> None:
    """Make an analysis folder, on the data that is there."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        model_folder(Path("source"), **SIZES)
        api.analyze("source", data=OUT / "data", out="looked", seq_len=12, num_sequences=4, loss_sequences=2, greedy=1)
        shutil.copytree("looked", OUT / "analysis", ignore=shutil.ignore_patterns(".lock", "*.html", "*.csv"))
        path = OUT / "analysis/analysis.json"
        path.write_text(path.read_text().replace(str(OUT), "golden"))


if __name__ == "__main__":
    main()
