"""What going on with a small model does to it: what the papers of recipe continual found, on real text.

Source: Gupta et al., arXiv:2308.04014; Ibrahim et al., arXiv:2403.08763.

Every bound is below the mean of seeds 0, 1 and 2 by at least three times their standard deviation; the comments give
the three. What does not hold by so much at this size is not asserted: that twice the peak adapts better or worse, that
a twentieth of replay saves a third of what a weak shift destroys (29, 24 and 23 % here).
"""

import gzip
import itertools
import json
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scionlm.core.records import read_jsonl
from scionlm.data import Corpora, DomainConfig, prepare
from scionlm.recipes.demo_data import PROSE
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from whole_runs import quicken

pytestmark = pytest.mark.slow

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
"""117,120 parameters, byte by byte."""
PEAK, FLOOR = 3e-3, 0.1
PRETRAINING, STEPS = 600, 200
SETTINGS = {
    "data.seq_len": 64, "train.global_batch_tokens": 1024, "train.micro_batch_size": 16, "train.precision": "fp32",
    "train.compile": False, "optimizer.lr": PEAK, "evaluate.tokens_per_domain": 8192, "evaluate.every": 0,
}  # fmt: skip
_PIECE, _DOMAIN = 2000, 800_000  # characters of a document, and of a domain


def cosine(warmup=0.01):
    return {"name": "cosine", "warmup": warmup, "min_lr_ratio": FLOOR}


CONSTANT = {"optimizer.lr": PEAK * FLOOR, "schedule": {"name": "constant", "warmup": 0}}
"""The rate that pre-training ended with: no re-warming."""


def peak(times):
    return {"optimizer.lr": PEAK * times}


class Seen(NamedTuple):
    """A loss in nats: before, at most on the way, and at the end."""

    before: float
    peak: float
    end: float


class Outcome(NamedTuple):
    """The losses on what was known and on what is new."""

    old: Seen
    new: Seen


class Lab:
    """A model that knows Python's standard library, and what becomes of it: each setting is run once.

    `code` is what it knows; `torch` is other Python, full of another kind of prose and names: a weak shift; `prose` is
    English: a strong one.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self._root, self._seed = root, seed
        self._runs: dict[str, Outcome] = {}
        self._prepare()
        self.run = root / "pretrained"
        changes = {
            "model": MODEL, "data.mixture": {"code": 1.0}, "train.steps": PRETRAINING, "schedule": cosine(),
            "checkpoint.every": 100, "checkpoint.keep_every": 100,
        }  # fmt: skip
        self._run("scratch", changes, self.run)

    def _prepare(self) -> None:
        library, layers = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent / "nn" / "modules"
        with gzip.open(PROSE, "rt", encoding="utf-8") as lines:
            prose = [json.loads(line)["text"] for line in lines]
        texts = {"code": _texts_in(library), "torch": _texts_in(layers), "prose": prose}
        for name, whole in texts.items():
            pieces = [text[at : at + _PIECE] for text in whole for at in range(0, len(text) - _PIECE, _PIECE)]
            random.Random(0).shuffle(pieces)
            lines = [json.dumps({"text": piece}) + "\n" for piece in pieces[: _DOMAIN // _PIECE]]
            (self._root / f"{name}.jsonl").write_text("".join(lines))
        corpora = Corpora(
            tokenizer=str(_bytes_tokenizer(self._root / "bytes")),
            domains={name: DomainConfig(paths=[f"{name}.jsonl"]) for name in texts},
            held_out={"fraction": 0.05, "min_documents": 8},
        )
        prepare(corpora, self._root, self._root / "data")

    def _run(self, recipe, changes, out) -> None:
        common = SETTINGS | {"data.dir": str(self._root / "data"), "seed": self._seed}
        run_recipe(load_recipe(recipe, common | changes), out)

    def onwards(self, domain: str, *settings: dict, recipe: str = "continual") -> Outcome:
        """Go on with the model on another domain, or begin anew, and return what became of the losses."""
        changes = {"data.mixture": {domain: 1.0}, "train.steps": STEPS, "schedule": cosine()}
        changes["upstream"] = {"domains": ["code"]}
        for more in settings:
            changes |= more
        if recipe == "scratch":
            changes["model"] = MODEL
        elif "branch" not in changes:
            changes["source"] = str(self.run / "model")
        key = json.dumps([recipe, changes], sort_keys=True)
        if key not in self._runs:
            out = self._root / f"run-{len(self._runs)}"
            self._run(recipe, changes, out)
            lines = read_jsonl(out / "metrics.jsonl")
            self._runs[key] = Outcome(_seen(lines, "code"), _seen(lines, domain))
        return self._runs[key]

    def replay(self, share: float) -> dict:
        """Return the setting that replays a share of what the model learned."""
        return {"replay": {"run": str(self.run), "fraction": share}}


def _seen(lines, domain):
    losses = [line[f"eval/{domain}/nll_nats"] for line in lines if f"eval/{domain}/nll_nats" in line]
    return Seen(losses[0], max(losses[1:]), losses[-1])


def _texts_in(folder):
    return [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]


def _bytes_tokenizer(folder):
    """Write a tokenizer of bytes, each a token; return its folder, which stands for a model's."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={"<|endoftext|>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}, merges=[])
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield Lab(tmp_path_factory.mktemp("lab"))


def forgotten(outcome):
    return outcome.old.end - outcome.old.before


def test_rewarming_adapts_and_forgets_and_a_little_replay_undoes_most_of_it(lab):
    """Under a strong shift, beside the rate that pre-training ended with."""
    still, warm = lab.onwards("prose", CONSTANT), lab.onwards("prose")
    assert forgotten(warm) > forgotten(still) + 0.4  # 0.90, 1.17, 1.07
    assert warm.new.end < still.new.end - 0.08  # 0.117, 0.119, 0.102
    replayed = lab.onwards("prose", lab.replay(0.05))
    assert forgotten(replayed) < 0.3 * forgotten(warm)  # 0.21, 0.17, 0.17
    assert replayed.new.end < warm.new.end + 0.03  # 0.007, 0.014, 0.007


@pytest.mark.parametrize(
    ("domain", "gaps"),
    # 0.04, 0.05, 0.05 and 0.04, 0.04, 0.03 (and 0.08, 0.07, 0.03: too uncertain)
    # 0.54, 0.78, 0.61 and 0.36, 0.40, 0.46 and 0.50, 0.29, 0.37
    [("torch", (0.02, 0.015)), ("prose", (0.25, 0.2, 0.05))],
)
def test_the_higher_the_peak_the_more_is_forgotten(lab, domain, gaps):
    runs = [lab.onwards(domain, setting) for setting in (CONSTANT, peak(0.5), peak(1), peak(2))]
    for (lower, higher), gap in zip(itertools.pairwise(runs), gaps, strict=False):
        assert forgotten(higher) > forgotten(lower) + gap


@pytest.mark.parametrize(
    ("domain", "gaps"),
    # 0.144, 0.115, 0.123 and 0.054, 0.069, 0.058
    # 0.081, 0.080, 0.074 and 0.036, 0.039, 0.028
    [("torch", (0.06, 0.03)), ("prose", (0.06, 0.015))],
)
def test_up_to_the_peak_of_before_a_higher_one_adapts_better(lab, domain, gaps):
    runs = [lab.onwards(domain, setting) for setting in (CONSTANT, peak(0.5), peak(1))]
    for (lower, higher), gap in zip(itertools.pairwise(runs), gaps, strict=True):
        assert higher.new.end < lower.new.end - gap


def test_whatever_the_peak_going_on_beats_beginning_anew(lab):
    anew = lab.onwards("torch", recipe="scratch")
    for times in (0.5, 1, 2):  # by 0.57 to 0.72
        assert lab.onwards("torch", peak(times)).new.end < anew.new.end - 0.3


def test_the_length_of_the_warmup_matters_at_first_and_not_at_the_end(lab):
    none, short, long = (lab.onwards("torch", {"schedule": cosine(warmup)}) for warmup in (0, 0.01, 0.03))
    ends = [run.new.end for run in (none, short, long)]
    assert max(ends) - min(ends) < 0.04  # 0.008, 0.022, 0.009
    assert none.new.peak > long.new.peak + 0.2  # 0.36, 0.30, 0.37
    assert none.new.peak > none.new.before + 0.05  # 0.40, 0.30, 0.39: the gap in stability
    kept = {"branch": {"run": str(lab.run)}, "optimizer_state": "keep", "schedule": cosine(0)}
    # 0.38, 0.26, 0.35: what Adam remembers is most of what a warm-up is for.
    assert none.new.peak > lab.onwards("torch", kept).new.peak + 0.1


def test_a_rate_that_decays_at_the_end_learns_more_than_one_that_stays(lab):
    """From random weights 200 steps are too few for it to show: 0.004, -0.037, -0.023."""
    flat, decaying = {"name": "constant", "warmup": 0.01}, {"name": "wsd", "warmup": 0.01, "decay": 0.2}
    ends = [lab.onwards("torch", {"schedule": schedule}).new.end for schedule in (flat, decaying)]
    assert ends[1] < ends[0] - 0.03  # 0.077, 0.055, 0.066


def test_rewarming_on_the_same_data_raises_the_loss_by_the_peak(lab):
    runs = [lab.onwards("code", setting) for setting in (CONSTANT, peak(0.5), peak(1), peak(2))]
    # 0.07, 0.08, 0.07 and 0.10, 0.13, 0.18 and 0.40, 0.53, 0.56
    for (lower, higher), gap in zip(itertools.pairwise(runs), (0.05, 0.01, 0.2), strict=True):
        assert higher.old.peak > lower.old.peak + gap


def test_the_more_is_replayed_the_less_is_forgotten(lab):
    runs = [lab.onwards("torch", *([lab.replay(share)] if share else [])) for share in (0, 0.05, 0.25, 0.5)]
    # 0.046, 0.047, 0.037 and 0.093, 0.088, 0.095 and 0.050, 0.074, 0.060
    for (less, more), gap in zip(itertools.pairwise(runs), (0.02, 0.07, 0.02), strict=True):
        assert forgotten(more) < forgotten(less) - gap
    assert forgotten(lab.onwards("prose", lab.replay(0.25))) < forgotten(lab.onwards("prose", lab.replay(0.05))) - 0.1


def test_a_strong_shift_destroys_more_than_a_weak_one(lab):
    assert forgotten(lab.onwards("prose")) > 2 * forgotten(lab.onwards("torch"))  # 13, 12, 14 times


def test_an_earlier_checkpoint_adapts_worse(lab):
    early = {"branch": {"run": str(lab.run), "step": 100}, "optimizer_state": "reset"}
    assert lab.onwards("torch", early).new.end > lab.onwards("torch").new.end + 0.2  # 0.38, 0.37, 0.45
